"""Trains any detector on scenes of handwritten digits, on COCO, or on Pascal VOC.

Claim     Each of these detectors, cut down to a backbone of four residual blocks, finds and
          names digits of 5 to 45 pixels on scenes of 128 x 128 with an average precision
          of 0.85 or more at an overlap of 0.5 (AP50), after 8 minutes on two cores:
          Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) on one map and on a pyramid
          (Lin et al. 2017, arXiv:1612.03144), R-FCN (Dai et al. 2016, arXiv:1605.06409) with
          and without deformable pooling (Dai et al. 2017, arXiv:1703.06211), TridentNet (Li
          et al. 2019, arXiv:1901.01892), YOLO v1 (Redmon et al. 2016, arXiv:1506.02640), v2
          (arXiv:1612.08242) and v3 (arXiv:1804.02767), FCOS (Tian et al. 2019,
          arXiv:1904.01355), CenterNet (Zhou et al. 2019, arXiv:1904.07850) and CornerNet (Law
          and Deng 2018, arXiv:1808.01244). For pictures of yours no claim is made.
Measured  COCO's twelve figures and Pascal VOC's two on scenes of other digits, images a
          second, parameters, seconds of training. Sizes are judged as if scenes were three
          times as large, so that "small" are digits of up to 10 pixels.
Run       python experiments/detect.py                       (FCOS; about 5 min on 2 CPU cores)
          python experiments/detect.py --model yolo_v3
          python experiments/detect.py --data voc:VOCdevkit/VOC2007 --model fcos \
              --pretrained microsoft/resnet-50
          python experiments/detect.py --help
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _detectors import (
    FILES,
    MAGNIFIED,
    STEPS,
    Name,
    judge,
    pretrained_detector,
    published_detector,
    scenes,
    small_detector,
    train_detector,
)

from jaxmodels import data, plots, weights
from jaxmodels.metrics import DetectionEvaluator
from jaxmodels.models.detection.detector import Detector
from jaxmodels.models.detection.image_pyramid import detect_multi_scale, multi_scale_loss
from jaxmodels.ops.detections import Detections
from jaxmodels.training import processes
from jaxmodels.training.experiment import Result, run
from jaxmodels.training.logging import read_metrics

GOAL = 0.85
SHOWN, CONFIDENT = 8, 0.3


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    model: Name = "fcos"
    data: str = "scenes"
    """"scenes", coco:FOLDER with annotations/ and pictures as published, or voc:FOLDER
    such as VOCdevkit/VOC2007."""
    splits: tuple[str, str] = ("", "")
    """For training and for testing; by default train2017 and val2017 of COCO, trainval and
    test of VOC."""
    canvas: int = 128
    """Side of the scenes."""
    count: tuple[int, int] = (1, 5)
    """Fewest and most digits in a scene."""
    scale: tuple[float, float] = (1.0, 6.0)
    """Smallest and largest digit, in units of 8 x 8 pixels."""
    test_scenes: int = 500
    shortest: int = 600
    """Of a picture's sides, from COCO and VOC; the longer is at most 5/3 of it."""
    width: int = 32
    """Channels of the backbone's first stage; the rest follows."""
    published: bool = False
    """The model at its published size in place of a small one, from random weights."""
    pretrained: str = ""
    """What the model, at its published size, starts from: a ResNet's folder or name on the
    Hub, such as microsoft/resnet-50, or the file of torchvision's Faster R-CNN."""
    same_classes: bool = False
    """That file's labels are the data's category ids, as in COCO: what it knows of them stays."""
    train_scales: tuple[float, ...] = (1.0,)
    """Sizes of images that steps draw from."""
    test_scales: tuple[float, ...] = (1.0,)
    """Sizes of images that are searched, and their boxes joined."""
    steps: int | None = None
    """By default as many as small detectors do on scenes in three to seven minutes on two
    cores, and 20,000 on pictures of yours."""
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    num_workers: int = 0
    seed: int = 0
    mesh: str = ""
    """Devices, such as "data=8"; by default one, or all of several processes."""
    checkpoint_every: int = 250
    log_every: int = 20
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/detect/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    if config.steps is None:
        steps = STEPS[config.model] if config.data == "scenes" else 20_000
        config = dataclasses.replace(config, steps=steps)
    check(config)
    train_set, test_set, channels = load_data(config)
    model, variables = make_model(config, train_set, channels)
    variables, seconds = train_detector(
        config,
        model,
        train_set,
        folder,
        variables=variables,
        loss=loss_of(config, model),
        num_workers=config.num_workers,
        mesh=config.mesh,
    )
    processes.first_goes_on()
    batches = data.evaluation_batches(test_set, config.batch_size)
    detect = detector_of(config, model)
    evaluator, rate = judge(
        model,
        variables,
        batches,
        len(test_set.class_names),
        magnified=MAGNIFIED if config.data == "scenes" else 1,
        detect=detect,
    )
    if config.pretrained.endswith(FILES):
        weights.save_torchvision_detector(model, variables, folder / "model.safetensors")
    draw_figure(folder, evaluator, detect, variables, next(iter(batches)), test_set.class_names)
    return conclude(config, evaluator, variables, rate, seconds)


def check(config: Config) -> None:
    """Refuses what would only fail after training."""
    if not config.train_scales or min(config.train_scales + config.test_scales) <= 0:
        raise ValueError(
            f"train_scales={config.train_scales} and test_scales={config.test_scales} must be "
            "positive numbers"
        )
    if config.same_classes and not config.pretrained:
        raise ValueError("same_classes: there are none without pretrained; pass both, or neither")
    for name in ("steps", "test_scenes", "width"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


def load_data(config: Config) -> tuple[data.Dataset, data.Dataset, int]:
    """What to learn from, what to be judged by, and the channels of both."""
    kind, _, folder = config.data.partition(":")
    if config.data == "scenes":
        return scenes(config, "train"), scenes(config, "test"), 1
    options = {"resize": data.ShortestSide(config.shortest, config.shortest * 5 // 3)}
    if kind == "coco" and folder:
        read, splits = partial(read_coco, Path(folder)), ("train2017", "val2017")
    elif kind == "voc" and folder:
        read, splits = partial(read_voc, Path(folder)), ("trainval", "test")
    else:
        raise ValueError(f"data={config.data!r}: give scenes, coco:FOLDER or voc:FOLDER")
    first, second = (given or usual for given, usual in zip(config.splits, splits, strict=True))
    return read(first, train=True, flip=True, **options), read(second, **options), 3


def read_coco(folder: Path, split: str, **options) -> data.DetectionDataset:
    annotations = folder / "annotations" / f"instances_{split}.json"
    return data.coco_detection(annotations, folder / split, **options)


def read_voc(folder: Path, split: str, **options) -> data.DetectionDataset:
    return data.voc_detection(folder, split=split, **options)


def make_model(
    config: Config, dataset: data.Dataset, channels: int
) -> tuple[Detector, dict[str, Any] | None]:
    """The detector, and the variables it starts from or None."""
    fields = {"num_classes": len(dataset.class_names), "channels": channels}
    if config.pretrained:
        if channels != 3:
            raise ValueError(
                f"pretrained={config.pretrained}: trained models see colour, the images have "
                f"{channels} channel"
            )
        # Their labels begin with the background.
        kept = [n - 1 for n in dataset.category_ids] if config.same_classes else None
        return pretrained_detector(
            config.model,
            config.pretrained,
            num_classes=len(dataset.class_names),
            seed=config.seed,
            classes=kept,
        )
    if config.published:
        return published_detector(config.model, **fields), None
    return small_detector(config.model, width=config.width, **fields), None


def loss_of(config: Config, model: Detector) -> Callable:
    """The loss at the scales that are trained, of images as the weights want them."""
    loss = model.loss
    if config.train_scales != (1.0,):
        loss = partial(multi_scale_loss, model, scales=config.train_scales)
    if not config.pretrained:
        return loss

    def normalised(params, batch, *others):
        images = weights.torchvision_images(batch["image"], batch.get("image_size"))
        return loss(params, {**batch, "image": images}, *others)

    return normalised


def detector_of(config: Config, model: Detector) -> Callable[..., Detections]:
    """From variables, images and their sizes to detections."""
    several = config.test_scales != (1.0,)

    def detect(variables, images, image_sizes):
        if config.pretrained:
            images = weights.torchvision_images(images, image_sizes)
        if several:
            return detect_multi_scale(model, variables, images, config.test_scales, image_sizes)
        return model.detect(variables, images, image_sizes)

    return detect


def conclude(
    config: Config, evaluator: DetectionEvaluator, variables, rate: float, seconds: float
) -> Result:
    """The claim held against the numbers."""
    coco, voc = evaluator.coco(), evaluator.voc()
    measured = {
        **coco.figures(),
        "VOC 2007 mAP": voc.map_2007,
        "VOC 2010 mAP": voc.map_2010,
        "images a second": rate,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "seconds of training": seconds,
        "detections left out": coco.left_out,
    }
    goal = GOAL if config.data == "scenes" else 0.0
    return Result(
        claim=f"{config.model}: AP50 of at least {goal} on scenes of other digits"
        if config.data == "scenes"
        else f"{config.model}: finds something",
        source="the paper of the detector, see the head of experiments/detect.py",
        holds=coco.ap50 > goal,
        measured=measured,
    )


def draw_figure(folder: Path, evaluator, detect, variables, batch, class_names) -> None:
    """The loss, precision against recall, and what was found on the first images."""
    figure = plots.new_figure(width=12.0, height=9.0)
    above, below = figure.subfigures(2, 1)
    left, right = above.subplots(1, 2)
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
    line = [record["step"] for record in records], [record["loss"] for record in records]
    plots.curve(left, {"training": line}, "step", "loss")
    coco = evaluator.coco()
    curves = {f"overlap {t:g}": coco.curve(threshold=t) for t in (0.5, 0.75, 0.9)}
    plots.precision_recall(right, curves, title="mean over classes")
    # All of the batch, for which it is compiled already.
    found = Detections(*map(np.asarray, jax.jit(detect)(variables, *inputs(batch))))
    shown = [found.scores[i] > CONFIDENT for i in range(min(SHOWN, len(batch["image"])))]
    plots.boxes_on_images(
        below.subplots(),
        batch["image"][: len(shown)],
        [found.boxes[i, kept] for i, kept in enumerate(shown)],
        [[class_names[k] for k in found.classes[i, kept]] for i, kept in enumerate(shown)],
        title=f"found with a score above {CONFIDENT}",
    )
    plots.save_figure(figure, folder / "figure.png")


def inputs(batch) -> tuple[jax.Array, jax.Array | None]:
    """Images and, if they were padded, their sizes."""
    sizes = batch.get("image_size")
    return jnp.asarray(batch["image"]), None if sizes is None else jnp.asarray(sizes)


if __name__ == "__main__":
    run(main, Config)
