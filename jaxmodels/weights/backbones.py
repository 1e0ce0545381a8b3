"""A trained classifier's weights inside a detector or a segmenter that is built on it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxmodels.models.detection.faster_rcnn import StageHead
from jaxmodels.models.detection.tridentnet import TridentNet
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.weights.table import check_shapes

_COLLECTIONS = ("params", "batch_stats")
# Of a deformable convolution, which a classifier's plain one has not; they start at zero.
_OWN = "offsets"


def with_backbone(
    model: nn.Module,
    variables: Mapping[str, Any],
    backbone: nn.Module,
    backbone_variables: Mapping[str, Any],
) -> dict[str, Any]:
    """Variables of a model whose ResNet has the weights of a trained one.

    Stages that the model has elsewhere are found there too: the last one as the head of
    Faster R-CNN on C4 or of TridentNet, and trident blocks. Published detectors start so;
    with frozen norms they learn little from random numbers.

    Args:
      model: whose field `backbone` is a ResNet, or has such a field itself, as a feature
        pyramid has.
      variables: of the model, as `init` returns them.
      backbone, backbone_variables: a ResNet and what it has learnt, such as
        `load_pretrained("microsoft/resnet-50", num_classes=0)` returns; a classifying
        layer is not used.

    Returns:
      New variables. What a ResNet has not (necks, heads, offsets of deformable
      convolutions) is as it was given.

    Raises:
      ValueError: the model has no ResNet or is given none, strides lie on other
        convolutions, or tensors do not fit (each is listed).
    """
    inner, path = _resnet_of(model)
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"with_backbone: backbone is a {type(backbone).__name__}, but the model has a ResNet"
        )
    if inner.bottleneck and backbone.stride_on != inner.stride_on:
        raise ValueError(
            f"with_backbone: backbone has stride_on={backbone.stride_on!r}, the model's ResNet "
            f"{inner.stride_on!r}; make the model with the former"
        )
    known, taken = _flat(variables), {}
    for (collection, name, *rest), value in _flat(backbone_variables).items():
        if (home := _home(model, inner, path, name)) is not None:
            taken[(collection, *home, *rest)] = value
    roots = [path, *([("trident",)] if _has_trident(model) else [])]
    roots += [("head",)] if _has_stage_head(model) else []
    expected = {
        key: value
        for key, value in known.items()
        if _OWN not in key and any(key[1 : len(root) + 1] == root for root in roots)
    }
    shapes = [
        {"/".join(key): np.shape(value) for key, value in of.items()} for of in (expected, taken)
    ]
    check_shapes("with_backbone: backbone_variables", *shapes)
    return {**variables, **unflatten_dict({**known, **taken})}


def _resnet_of(model: nn.Module) -> tuple[ResNet, tuple[str, ...]]:
    """The ResNet inside a model and the path of its parameters."""
    inner, path = model, ()
    while not isinstance(inner, ResNet):
        if not hasattr(inner, "backbone"):
            raise ValueError(
                f"with_backbone: a {type(model).__name__} on a {type(inner).__name__} has no "
                f"ResNet to fill"
            )
        inner, path = inner.backbone, (*path, "backbone")
    return inner, path


def _home(
    model: nn.Module, inner: ResNet, path: tuple[str, ...], name: str
) -> tuple[str, ...] | None:
    """Where the model has a ResNet's part of this name; None if nowhere."""
    kind, *numbers = name.split("_")
    if kind == "head":
        return None
    if kind != "stages":
        return (*path, name)
    stage, block = map(int, numbers)
    last = len(inner.depths) - 1
    if stage > last:
        stage_head = stage == last + 1 and _has_stage_head(model)
        return ("head", f"block_{block}") if stage_head else None
    if stage == last and block >= inner.depths[stage] and _has_trident(model):
        return ("trident", f"block_{block - inner.depths[stage]}")
    return (*path, name)


def _has_trident(model: nn.Module) -> bool:
    return isinstance(model, TridentNet)


def _has_stage_head(model: nn.Module) -> bool:
    return isinstance(getattr(model, "head", None), StageHead)


def _flat(variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return flatten_dict({name: variables[name] for name in _COLLECTIONS if name in variables})
