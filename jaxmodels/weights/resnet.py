"""ResNet as `transformers` writes it: model type resnet."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.weights.classifiers import REQUIRED, Config, require_fields
from jaxmodels.weights.family import Family, image_input
from jaxmodels.weights.table import CONVOLUTION, Row, affine, dense

_CONFIG = Config(
    "resnet",
    "ResNet",
    {
        "depths": ("depths", REQUIRED),
        "hidden_sizes": ("widths", REQUIRED),
        "embedding_size": ("stem_width", 64),
        "num_channels": ("in_channels", 3),
    },
    {"hidden_act": "relu", "downsample_in_first_stage": False},
)
_KINDS = {"basic": False, "bottleneck": True}


def _from_config(config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    fields = _CONFIG.read(config, names)
    fields["bottleneck"] = _KINDS[config.get("layer_type", "bottleneck")]
    fields["stride_on"] = "1x1" if config.get("downsample_in_bottleneck") else "3x3"
    return fields


def _to_config(model: ResNet) -> dict[str, Any]:
    require_fields("resnet", model, stem="imagenet", output_stride=32)
    kind = {
        "layer_type": "bottleneck" if model.bottleneck else "basic",
        "downsample_in_bottleneck": model.stride_on == "1x1",
    }
    return {**_CONFIG.write(model), **kind}


def _units(model: ResNet) -> Iterator[tuple[str, str]]:
    """Each convolution with its norm: our path and theirs."""
    prefix = "resnet." if model.num_classes else ""
    yield "stem_conv", f"{prefix}embedder.embedder"
    before = model.stem_width
    for stage, (depth, width) in enumerate(zip(model.depths, model.widths, strict=True)):
        for block in range(depth):
            ours = f"stages_{stage}_{block}"
            theirs = f"{prefix}encoder.stages.{stage}.layers.{block}"
            if block == 0 and (stage or before != width):
                yield f"{ours}/shortcut", f"{theirs}.shortcut"
            for i in range(3 if model.bottleneck else 2):
                yield f"{ours}/conv_{i + 1}", f"{theirs}.layer.{i}"
        before = width


def _tables(model: ResNet) -> dict[str, list[Row]]:
    params, statistics = [], []
    for ours, theirs in _units(model):
        norm = f"{theirs}.normalization"
        params.append(Row(f"{ours}/conv/kernel", f"{theirs}.convolution.weight", CONVOLUTION))
        params += affine(f"{ours}/norm", norm)
        statistics += [
            Row(f"{ours}/norm/mean", f"{norm}.running_mean"),
            Row(f"{ours}/norm/var", f"{norm}.running_var"),
        ]
    if model.num_classes:
        params += dense("head", "classifier.1")
    return {"params": params, "batch_stats": statistics}


def _constants(model: ResNet) -> dict[str, np.ndarray]:
    """Numbers of updates, which only torch's cumulative average would read."""
    zero = np.zeros((), np.int64)
    return {f"{theirs}.normalization.num_batches_tracked": zero for _, theirs in _units(model)}


RESNET = Family(
    name="resnet",
    model=ResNet,
    accepts=_CONFIG.accepts,
    from_config=_from_config,
    to_config=_to_config,
    tables=_tables,
    example_inputs=lambda model: image_input(32, model.in_channels),
    head="head",
    ignored=r".*\.num_batches_tracked",
    constants=_constants,
)
