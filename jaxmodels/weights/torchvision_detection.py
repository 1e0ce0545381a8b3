"""Faster R-CNN as torchvision writes it: the state dict of `fasterrcnn_resnet50_fpn`.

A state dict is one file without a config.json, so it has functions of its own and is
no `Family`. Theirs has background as class 0; ours has none among the classes, so
their label is our class plus one.
"""

import pickle
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxmodels.layers.normalization import FrozenBatchNorm
from jaxmodels.models.detection.faster_rcnn import FasterRCNN, faster_rcnn_resnet50_fpn
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.weights.table import (
    CONVOLUTION,
    Layout,
    Row,
    affine,
    check_shapes,
    dense,
    expected_tensors,
    export_tensors,
    import_tensors,
)

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EPSILON = FrozenBatchNorm.epsilon
_CLASSIFIER = "roi_heads.box_predictor.cls_score.bias"
# Counted by batch norms that were not frozen; nothing reads it.
_IGNORED = re.compile(r".*\.num_batches_tracked")
# Files older than torchvision 0.13, such as the published COCO one, have flatter names.
_OLDER = {
    re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)"): r"\1.0.\2",
    re.compile(r"(rpn\.head\.conv)\.(weight|bias)"): r"\1.0.0.\2",
}


def load_torchvision_detector(
    path: str | Path,
    *,
    classes: Sequence[int] | None = None,
    norm_epsilon: float = _EPSILON,
    **overrides: Any,
) -> tuple[FasterRCNN, dict]:
    """Reads a state dict of torchvision's `fasterrcnn_resnet50_fpn`.

    The model takes images as `torchvision_images` makes them.

    Args:
      path: a .safetensors file, or a .pth or .pt file, which needs torch and is read
        with `weights_only=True`: nothing in it is run.
      classes: of the file, those to keep, in this order; background is not counted.
        The published file has a class for each number up to 90, of which COCO uses 80
        as category ids: for its data pass `[id - 1 for id in dataset.category_ids]`.
      norm_epsilon: that the frozen norms had; torchvision's is 1e-5, except for the
        published file `fasterrcnn_resnet50_fpn_coco-258fb6c6.pth`, which has 0. Another
        than 1e-5 is folded into the scales.
      **overrides: fields of `faster_rcnn_resnet50_fpn`. A `num_classes` other than the
        file's, or than there are `classes`, gives the box branch new last layers, of
        zeros, to fine-tune.

    Returns:
      The module, and its variables with float32 parameters, as `init` would return them.

    Raises:
      ValueError: not such a file, torch is not there for it, or tensors do not fit
        (every missing, extra or misshapen one is listed); or no such class.
    """
    path = Path(path)
    tensors = _read(path)
    count = len(tensors[_CLASSIFIER]) - 1 if _CLASSIFIER in tensors else 90
    wanted = overrides.pop("num_classes", count if classes is None else len(classes))
    model = faster_rcnn_resnet50_fpn(num_classes=count, **overrides)
    shapes, tables, expected = _shapes(model), _tables(model), {}
    for collection, rows in tables.items():
        expected |= expected_tensors(rows, shapes[collection], model)
    found = {name: array.shape for name, array in tensors.items()}
    check_shapes(f"load_torchvision_detector: {path}", expected, found)
    variables = {name: import_tensors(rows, tensors, model) for name, rows in tables.items()}
    variables = _with_scales(variables, (_EPSILON, norm_epsilon))
    if classes is not None:
        variables["params"] |= _of_classes(variables["params"], classes, count)
        count = len(classes)
        model = model.clone(num_classes=count)
    if wanted != count:
        model = model.clone(num_classes=wanted)
        new = _shapes(model)["params"]
        for name in ("classify", "refine"):
            variables["params"][name] = jax.tree.map(lambda x: np.zeros(x.shape), new[name])
    return model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)


def save_torchvision_detector(
    model: FasterRCNN, variables: Mapping, path: str | Path, *, norm_epsilon: float = _EPSILON
) -> None:
    """Writes a state dict that torchvision's `fasterrcnn_resnet50_fpn` loads.

    Args:
      model: a Faster R-CNN on a pyramid of a bottleneck ResNet, with a two-layer head.
      variables: parameters and "batch_stats".
      path: of a .safetensors file, or a .pth or .pt file, which needs torch; an old
        file stays whole if anything goes wrong.
      norm_epsilon: as of `load_torchvision_detector`.

    Raises:
      ValueError: the variables are not the model's, or another ending of the name.
    """
    path, tensors = Path(path), {}
    shapes, variables = _shapes(model), {**variables}
    for collection in ("params", "batch_stats"):
        expected, found = (
            {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}
            for tree in (shapes[collection], variables.get(collection, {}))
        )
        where = f"save_torchvision_detector: variables[{collection!r}]"
        check_shapes(where, expected, found)
    variables = _with_scales(variables, (norm_epsilon, _EPSILON))
    for collection, rows in _tables(model).items():
        tensors |= export_tensors(rows, variables[collection], model)
    _write(path, {name: np.asarray(array, order="C") for name, array in tensors.items()})


def torchvision_images(
    images: Float[Array, "B Y X 3"], image_sizes: Float[Array, "B 2"] | None = None
) -> Float[Array, "B Y X 3"]:
    """Images as torchvision's weights want them, from images in [-1, 1].

    out = ((in + 1) / 2 - mean) / std, with the mean and deviation of ImageNet, and 0 in
    the padding. torchvision also resizes: the shorter side to 800 pixels, unless the
    longer one then has more than 1333.

    Args:
      images: RGB.
      image_sizes: rows and columns without padding; None means that nothing was padded.

    Source: torchvision's `GeneralizedRCNNTransform`.
    """
    mean, std = (jnp.array(each, jnp.float32)[None, None, None] for each in (_MEAN, _STD))
    out = ((images + 1) / 2 - mean) / std
    if image_sizes is None:
        return out
    inside = [
        jnp.arange(count)[None, :] < image_sizes[:, axis, None]
        for axis, count in enumerate(images.shape[1:3])
    ]
    return jnp.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], out, 0)


def _shapes(model: FasterRCNN) -> dict:
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def _of_classes(params: Mapping, classes: Sequence[int], count: int) -> dict:
    """The box branch's last layers with the background and some classes alone."""
    if not classes or len({*classes}) < len(classes) or not all(0 <= c < count for c in classes):
        raise ValueError(
            f"load_torchvision_detector: classes={list(classes)} must be different numbers of the "
            f"file's classes, 0 to {count - 1}"
        )
    kept = [0, *(c + 1 for c in classes)]

    def rows(x):
        x = np.asarray(x)
        return x.reshape(*x.shape[:-1], count + 1, -1)[..., kept, :].reshape(*x.shape[:-1], -1)

    return {name: jax.tree.map(rows, params[name]) for name in ("classify", "refine")}


def _units(body: ResNet) -> Iterator[tuple[str, str, str]]:
    """Each convolution with its norm: our path, and theirs of both."""
    yield "stem_conv", "conv1", "bn1"
    before = body.stem_width
    for stage, (depth, width) in enumerate(zip(body.depths, body.widths, strict=True)):
        for block in range(depth):
            ours, theirs = f"stages_{stage}_{block}", f"layer{stage + 1}.{block}"
            if block == 0 and (stage or before != width):
                yield f"{ours}/shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1"
            for i in range(1, 4 if body.bottleneck else 3):
                yield f"{ours}/conv_{i}", f"{theirs}.conv{i}", f"{theirs}.bn{i}"
        before = width


def _tables(model: FasterRCNN) -> dict[str, list[Row]]:
    params, statistics = [], []
    for unit, conv, norm in _units(model.backbone.backbone):
        ours, norm = f"backbone/backbone/{unit}", f"backbone.body.{norm}"
        kernel = f"backbone.body.{conv}.weight"
        params += [Row(f"{ours}/conv/kernel", kernel, CONVOLUTION), *affine(f"{ours}/norm", norm)]
        statistics += [
            Row(f"{ours}/norm/mean", f"{norm}.running_mean"),
            Row(f"{ours}/norm/var", f"{norm}.running_var"),
        ]
    for i in range(len(model.backbone.levels)):
        params += _conv(f"backbone/lateral_{i}/conv", f"backbone.fpn.inner_blocks.{i}.0")
        params += _conv(f"backbone/output_{i}/conv", f"backbone.fpn.layer_blocks.{i}.0")
    params += _conv("region_proposals/conv", "rpn.head.conv.0.0")
    params += _conv("region_proposals/objectness", "rpn.head.cls_logits")
    params += _conv("region_proposals/boxes", "rpn.head.bbox_pred")
    first, heads = "roi_heads.box_head.fc6", "roi_heads.box_predictor"
    params += [
        Row("head/hidden_1/kernel", f"{first}.weight", _flattened(model.region_size)),
        Row("head/hidden_1/bias", f"{first}.bias"),
        *dense("head/hidden_2", "roi_heads.box_head.fc7"),
        *dense("classify", f"{heads}.cls_score"),
        *dense("refine", f"{heads}.bbox_pred"),
    ]
    return {"params": params, "batch_stats": statistics}


def _conv(ours: str, theirs: str) -> list[Row]:
    kernel = Row(f"{ours}/kernel", f"{theirs}.weight", CONVOLUTION)
    return [kernel, Row(f"{ours}/bias", f"{theirs}.bias")]


def _flattened(size: int) -> Layout:
    """Theirs flattens a region as (C, Y, X), ours as (Y, X, C)."""
    return Layout(
        read=lambda a: a.reshape(len(a), -1, size, size).transpose(2, 3, 1, 0).reshape(-1, len(a)),
        write=lambda a, model: (
            a.reshape(size, size, -1, a.shape[-1]).transpose(3, 2, 0, 1).reshape(a.shape[-1], -1)
        ),
    )


def _with_scales(variables: Mapping, epsilons: tuple[float, float]) -> dict:
    """Scales that do with the first epsilon what those given do with the second."""
    params = flatten_dict(variables["params"])
    for path, var in flatten_dict(variables["batch_stats"]).items():
        if path[-1] == "var":
            var, (new, old) = np.asarray(var), np.float32(epsilons)
            scale = (*path[:-1], "scale")
            params[scale] = np.asarray(params[scale]) * np.sqrt((var + new) / (var + old))
    return {**variables, "params": unflatten_dict(params)}


def _read(path: Path) -> dict[str, np.ndarray]:
    function = "load_torchvision_detector"
    if not path.is_file():
        raise ValueError(f"{function}: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{function}: {path} is not a whole safetensors file: {error}; download or save "
                f"it again"
            ) from error
    else:
        tensors = _read_torch(function, path)
    return {_newer(name): array for name, array in tensors.items() if not _IGNORED.fullmatch(name)}


def _read_torch(function: str, path: Path) -> dict[str, np.ndarray]:
    torch = _torch(function, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{function}: {path} is damaged, or holds more than tensors, which could run any code "
            f"when opened: {error}"
        ) from error
    tensors = content if isinstance(content, Mapping) else {}
    if not tensors or not all(torch.is_tensor(each) for each in tensors.values()):
        held = sorted(map(str, tensors)) if tensors else type(content).__name__
        raise ValueError(
            f"{function}: {path} holds {held}, not tensors by name; save the model's state_dict() "
            f"alone"
        )
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    function = "save_torchvision_detector"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, new, metadata={"format": "pt"})
        else:
            torch = _torch(function, path)
            torch.save({name: torch.tensor(array) for name, array in tensors.items()}, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _torch(function: str, path: Path) -> Any:
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{function}: {path} ends in none of '.safetensors', '.pth' and '.pt'")
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{function}: {path} is torch's format and torch is not installed; install it or take "
            f"a .safetensors file"
        ) from error
    return torch


def _newer(name: str) -> str:
    for old, new in _OLDER.items():
        if old.fullmatch(name):
            return old.sub(new, name)
    return name
