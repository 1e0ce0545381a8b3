"""Detectors of a size for scenes of digits: made, trained and judged alike for several scripts."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import create_model, data, load_pretrained, training, weights
from jaxmodels.metrics import DetectionEvaluator
from jaxmodels.models.detection.detector import Detector
from jaxmodels.models.detection.faster_rcnn import TwoLayerHead
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.training import processes
from jaxmodels.training.experiment import trajectory_fields
from jaxmodels.training.files import write_json

Name = Literal[
    "faster_rcnn",
    "faster_rcnn_fpn",
    "r_fcn",
    "r_fcn_deformable",
    "tridentnet",
    "yolo_v1",
    "yolo_v2",
    "yolo_v3",
    "fcos",
    "centernet",
    "cornernet",
]

# Digits of 8 to 48 pixels and the limits of COCO's sizes, 32 and 96: as pictures three times as
# large, a sixth of the digits are small, a quarter large.
MAGNIFIED = 3
# As many as take three to seven minutes on two cores, batches of 16 scenes of 128 x 128.
STEPS: dict[Name, int] = {
    "faster_rcnn": 2500,
    "faster_rcnn_fpn": 1500,
    "r_fcn": 1800,
    "r_fcn_deformable": 1200,
    "tridentnet": 800,
    "yolo_v1": 1200,
    "yolo_v2": 1000,
    "yolo_v3": 2000,
    "fcos": 900,
    "centernet": 1200,
    "cornernet": 1100,
}
# What torchvision's state dicts are kept in.
FILES = (".safetensors", ".pth", ".pt")
# Sides of the digits, the roots of their areas, and heights over widths.
_SIDES, _RATIOS = (8.0, 15.0, 23.0, 35.0), (1.4, 2.2)
_SHAPES = ((5.0, 9.0), (10.0, 14.0), (15.0, 22.0), (21.0, 31.0), (29.0, 42.0))


def small_detector(
    name: Name,
    *,
    num_classes: int,
    channels: int,
    width: int = 32,
    dilated: bool = False,
    **fields: Any,
) -> Detector:
    """A detector that learns digits of 5 to 45 pixels on two CPU cores in minutes.

    Args:
      name: of the method.
      num_classes: of the data.
      channels: of the images.
      width: of the backbone's first stage; heads follow.
      dilated: the last two stages dilate instead of striding, so that their maps have a
        stride of 8.
      **fields: of the detector, in place of those chosen here.
    """
    stages = create_model(
        "resnet18",
        depths=(1, 1, 1, 1),
        widths=(width, 2 * width, 3 * width, 4 * width),
        stem_width=width,
        in_channels=channels,
        num_classes=0,
        output_stride=8 if dilated or name in _DILATED else 32,
    )
    registered, fields_of = _KNOWN[name]
    chosen = fields_of(stages, width)
    return create_model(registered, **{"num_classes": num_classes, **chosen, **fields})


def published_detector(name: Name, *, num_classes: int, channels: int) -> Detector:
    """The same method at its published size; nothing of it is trained yet."""
    if channels != 3:
        raise ValueError(f"published: published models see colour, the images have {channels}")
    return create_model(_KNOWN[name][0], num_classes=num_classes)


def pretrained_detector(
    name: Name, source: str, *, num_classes: int, seed: int, classes: Sequence[int] | None = None
) -> tuple[Detector, dict[str, Any]]:
    """The method at its published size, with what there is of weights to start from.

    Args:
      name: of the method.
      source: a ResNet's folder or name on the hub; or a file of torchvision's Faster
        R-CNN, which "faster_rcnn_fpn" alone can start from.
      num_classes: of the data.
      seed: of the random weights of what a ResNet has not.
      classes: of the file, those that the data's are; None begins with new ones.

    Returns:
      The detector and its variables; it takes `weights.torchvision_images`.
    """
    if source.endswith(FILES):
        if name != "faster_rcnn_fpn":
            raise ValueError(
                f"pretrained={source}: a file is torchvision's Faster R-CNN, not a {name}; take "
                f"--model faster_rcnn_fpn, or a folder of a ResNet"
            )
        return weights.load_torchvision_detector(source, num_classes=num_classes, classes=classes)
    if classes is not None:
        raise ValueError(
            f"pretrained={source}: a ResNet knows no boxes; leave same_classes out, or give the "
            f"file of torchvision's Faster R-CNN"
        )
    trained = load_pretrained(source, num_classes=0)
    model = published_detector(name, num_classes=num_classes, channels=3)
    images = jnp.zeros((1, 128, 128, 3))
    variables = jax.jit(model.init)(jax.random.key(seed), images)
    return model, weights.with_backbone(model, variables, *trained)


def _pyramid(stages: nn.Module, width: int, levels: tuple[str, ...]) -> FeaturePyramid:
    return FeaturePyramid(stages, levels=levels, width=2 * width, extra=None, norm="batch")


def _two_stage(width: int) -> dict[str, Any]:
    """What the methods with proposals have in common: few of them, as scenes hold few digits."""
    return {
        "anchor_ratios": _RATIOS,
        "proposal_width": 2 * width,
        "candidates": (200, 100),
        "proposals": (64, 32),
        "proposal_samples": 64,
    }


def _faster_rcnn(stages, width):
    one_map = {"proposal_maps": ("C3",), "region_maps": ("C3",), "anchor_sizes": (_SIDES,)}
    head = {"head": TwoLayerHead(8 * width), "region_samples": 32, "region_size": 5}
    return {"backbone": stages, **_two_stage(width), **one_map, **head}


def _faster_rcnn_fpn(stages, width):
    levels = {
        "proposal_maps": ("P2", "P3", "P4"),
        "region_maps": ("P2", "P3", "P4"),
        "anchor_sizes": ((8.0, 12.0), (17.0, 24.0), (33.0, 42.0)),
        "canonical_size": 48.0,
    }
    head = {"head": TwoLayerHead(8 * width), "region_samples": 32, "region_size": 5}
    backbone = _pyramid(stages, width, ("C2", "C3", "C4"))
    return {"backbone": backbone, **_two_stage(width), **levels, **head}


def _r_fcn(stages, width):
    parts = {"grid": 3, "width": 4 * width, "num_hardest": 24, "anchor_sizes": _SIDES}
    # Aligned: a bin of a small digit is less than a cell, which the paper's would round to.
    maps = {"proposal_map": "C4", "region_map": "C5", "pooling": "align"}
    return {"backbone": stages, **_two_stage(width), **maps, **parts}


def _r_fcn_deformable(stages, width):
    return {**_r_fcn(stages, width), "pooling": "deformable"}


def _tridentnet(stages, width):
    branches = {
        "level": "C3",
        "depth": 2,
        "bottleneck": False,
        "ranges": ((0, 16), (10, 30), (22, 1e9)),
        "anchor_sizes": _SIDES,
        "head": TwoLayerHead(8 * width),
        "region_samples": 24,
        "region_size": 5,
        "norm": "batch",
    }
    return {"backbone": stages, **_two_stage(width), **branches}


def _yolo_v1(stages, width):
    chosen = {"image_size": None, "level": "C3", "width": 4 * width, "stride": 1, "norm": "batch"}
    return {"backbone": stages, **chosen}


def _yolo_v2(stages, width):
    maps = {"level": "C3", "passthrough": "C2", "width": 4 * width, "passthrough_width": width // 2}
    return {"backbone": stages, "anchors": _SHAPES, **maps}


def _yolo_v3(stages, width):
    levels = {
        "levels": ("C2", "C3", "C4"),
        "anchors": (_SHAPES[:2], _SHAPES[2:4], _SHAPES[4:]),
        "widths": (width, width, 2 * width),
    }
    return {"backbone": stages, **levels}


def _fcos(stages, width):
    # A point sees half of a digit on each side of it.
    head = {"size_limits": (12.0, 26.0), "head_width": 2 * width, "head_depth": 2}
    backbone = _pyramid(stages, width, ("C2", "C3", "C4"))
    return {"backbone": backbone, **head}


def _centernet(stages, width):
    """On the finest map of a pyramid: up-convolutions from stride 32 lose digits this small."""
    backbone = _pyramid(stages, width, ("C2", "C3", "C4"))
    return {"backbone": backbone, "head_width": 2 * width}


def _cornernet(stages, width):
    """Has no residual stages: it is made of an hourglass, narrow as its finest map is dear."""
    narrow = 3 * width // 2
    backbone = create_model(
        "hourglass104",
        widths=(narrow, narrow, 3 * width),
        depths=(1, 1, 1),
        stacks=1,
        stem_width=width,
        in_channels=stages.in_channels,
    )
    head = {"pool_width": narrow, "head_width": narrow, "embedding_weight": 1.0}
    # Embeddings learnt in minutes are rough; two digits of a class in a scene are rare.
    pairs = {"max_distance": 1.0, "corners": 40, "candidates": 200}
    return {"backbone": backbone, **head, **pairs}


_KNOWN: dict[str, tuple[str, Callable[[nn.Module, int], dict[str, Any]]]] = {
    "faster_rcnn": ("faster_rcnn_resnet50_c4", _faster_rcnn),
    "faster_rcnn_fpn": ("faster_rcnn_resnet50_fpn", _faster_rcnn_fpn),
    "r_fcn": ("r_fcn_resnet101", _r_fcn),
    "r_fcn_deformable": ("r_fcn_resnet101_deformable", _r_fcn_deformable),
    "tridentnet": ("tridentnet_resnet101", _tridentnet),
    "yolo_v1": ("yolo_v1", _yolo_v1),
    "yolo_v2": ("yolo_v2", _yolo_v2),
    "yolo_v3": ("yolo_v3", _yolo_v3),
    "fcos": ("fcos_resnet50_fpn", _fcos),
    "centernet": ("centernet_resnet18", _centernet),
    "cornernet": ("cornernet_hourglass104", _cornernet),
}
_DILATED = ("r_fcn", "r_fcn_deformable")


class Schedule(Protocol):
    """The fields of a script's configuration that training goes by."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    weight_decay: float
    seed: int
    checkpoint_every: int
    log_every: int


class Scenes(Protocol):
    """The fields of a script's configuration that say what scenes look like."""

    canvas: int
    count: tuple[int, int]
    scale: tuple[float, float]
    test_scenes: int
    steps: int
    batch_size: int
    seed: int


def scenes(config: Scenes, split: Literal["train", "test"]) -> data.DigitScenes:
    """Scenes to learn from, none of them seen twice, or to be judged by."""
    size = config.steps * config.batch_size if split == "train" else config.test_scenes
    canvas = (config.canvas, config.canvas)
    options = {"canvas": canvas, "count": config.count, "scale": config.scale}
    return data.digit_scenes(split, size=size, seed=config.seed, **options)


def train_detector(
    config: Schedule,
    model: Detector,
    dataset: data.Dataset,
    folder: Path,
    *,
    variables: Mapping[str, Any] | None = None,
    loss: Callable | None = None,
    num_workers: int = 0,
    mesh: str = "",
) -> tuple[dict[str, Any], float]:
    """Trains with AdamW and a moving average, or goes on where `folder` stands.

    Args:
      config: the schedule, and whatever else determines the result.
      variables: to start from, in place of random ones.
      loss: in place of `model.loss`.
      mesh: as of `training.make_mesh`; "" is one device, or all of several processes.

    Returns:
      The averaged variables, whole and on the host if there is a mesh, and how long
      their training took in seconds.
    """
    optimizer = training.adamw(
        config.learning_rate,
        steps=config.steps,
        warmup=min(config.warmup, config.steps - 1),
        weight_decay=config.weight_decay,
        clip_norm=10.0,
    )
    image = next(iter(data.evaluation_batches(dataset, 1)))["image"]
    example = {"images": jax.ShapeDtypeStruct(image.shape, jnp.float32)}
    key = jax.random.key(config.seed)
    devices = training.make_mesh(mesh) if mesh or jax.process_count() > 1 else None
    state = training.init_state(model, optimizer, key, example, mesh=devices, ema=True)
    if variables is not None:
        state = training.start_from(state, variables)
    started = time.perf_counter()
    state = training.fit(
        state,
        training.make_step(loss or model.loss, optimizer, ema=0.998),
        data.batches(
            dataset,
            **processes.share(config.batch_size),
            seed=config.seed,
            num_workers=num_workers,
        ),
        steps=config.steps,
        directory=folder,
        config=trajectory_fields(config),
        mesh=devices,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        description=folder.name,
    )
    cost, seconds = folder / "cost.json", time.perf_counter() - started
    if processes.is_first():
        # A run that goes on finds this detector trained already.
        if not cost.exists():
            write_json(cost, {"seconds": seconds})
        seconds = json.loads(cost.read_text())["seconds"]
    trained = {"params": state.ema, **state.model_state}
    return trained if devices is None else processes.to_host(trained), seconds


def judge(
    model: Detector,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    num_classes: int,
    *,
    magnified: float = 1,
    detect: Callable | None = None,
) -> tuple[DetectionEvaluator, float]:
    """Detects in all images of a data set.

    Args:
      batches: from `data.evaluation_batches`.
      magnified: how many times larger the pictures are taken to be where sizes are judged.
      detect: `(variables, images, image_sizes)`, in place of `model.detect`.

    Returns:
      What was found beside what is there, and images a second after the first batch.
    """
    compiled = jax.jit(detect or model.detect)
    evaluator, seconds, images = DetectionEvaluator(num_classes), 0.0, 0
    for number, batch in enumerate(batches):
        started = time.perf_counter()
        found = jax.block_until_ready(compiled(variables, batch["image"], batch.get("image_size")))
        if number:
            seconds += time.perf_counter() - started
            images += len(batch["image"])
        scale = np.asarray(batch.get("scale", np.ones((len(batch["image"]), 2)))) / magnified
        evaluator.add_batch(found, {**batch, "scale": scale})
    return evaluator, images / seconds if seconds else float("nan")
