"""Eleven detectors on the same scenes: how good, how fast, and what each paper's idea brings.

Claim     1. A feature pyramid helps, small objects most of all (Lin et al. 2017,
             arXiv:1612.03144, tables 1 and 3).
          2. R-FCN is as accurate as Faster R-CNN with a faster head, as nothing is computed
             for each region but a mean, where that runs the last stage of its ResNet (Dai et
             al. 2016, arXiv:1605.06409, tables 3 and 6).
          3. The middle branch of TridentNet alone keeps most of what three branches find
             (Li et al. 2019, arXiv:1901.01892, table 6).
          4. Boxes learnt by generalized IoU are a little better than by L1 (Rezatofighi et
             al. 2019, arXiv:1902.09630, tables 1 to 5).
Measured  Each detector trained for equally many steps on the same scenes of digits with the
          same backbone (CornerNet has its hourglass): COCO's AP, AP50 and AP by size, judged
          as if scenes were three times as large, on scenes of other digits; images a second
          in inference, and milliseconds an image of what follows the backbone ("head", the
          median of what a whole batch takes beyond its backbone); seconds of training,
          parameters. FCOS is trained with both losses,
          TridentNet also with all branches for all sizes, as its single branch needs, and
          Faster R-CNN also with the last stage as its head, R-FCN's counterpart. "As
          accurate" is within 2 points of AP, "a little better" more than 0. One seed:
          differences of a point mean little.
Run       python experiments/detector_comparison.py          (some 50 min on 2 CPU cores)
          python experiments/detector_comparison.py --models faster_rcnn faster_rcnn_fpn
          python experiments/detector_comparison.py --help
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from _detectors import MAGNIFIED, Name, judge, scenes, small_detector, train_detector

from jaxmodels import create_model, data, plots
from jaxmodels.models.detection.faster_rcnn import StageHead
from jaxmodels.training.experiment import Result, run
from jaxmodels.training.files import write_json

ALL: tuple[Name, ...] = Name.__args__
STAGE_HEAD = "faster_rcnn, last stage as head"
EVERYWHERE = ((0.0, 1e9),) * 3
CLOSE = 0.02
# Of a batch through each detector and through its backbone alone, for the head's time.
TURNS = 15


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    models: tuple[Name, ...] = ALL
    """Detectors to compare; claims about others are not judged."""
    canvas: int = 128
    """Side of the scenes."""
    count: tuple[int, int] = (1, 5)
    """Fewest and most digits in a scene."""
    scale: tuple[float, float] = (1.0, 6.0)
    """Smallest and largest digit, in units of 8 x 8 pixels."""
    test_scenes: int = 500
    width: int = 32
    """Channels of the backbone's first stage; the rest follows."""
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_every: int = 250
    log_every: int = 20
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/detector_comparison/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    measured = {}
    for name, (model, fields) in trials(config).items():
        measured[name] = train_and_judge(config, model, fields, folder / name)
    if "tridentnet for one branch" in measured:
        measured["tridentnet, one branch"] = judge_one_branch(config, folder)
    draw_figure(folder, measured)
    return conclude(measured)


def check(config: Config) -> None:
    """Refuses what would only fail, or mean nothing, after training."""
    if not config.models or len(set(config.models)) < len(config.models):
        raise ValueError(f"models={config.models}: give one name or more, each once")
    for name in ("steps", "test_scenes", "width"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


def trials(config: Config) -> dict[str, tuple[Name, dict[str, Any]]]:
    """Names of what is trained, with the detector and the fields that make it special."""
    chosen: dict[str, tuple[Name, dict[str, Any]]] = {name: (name, {}) for name in config.models}
    if "tridentnet" in chosen:
        chosen["tridentnet for one branch"] = ("tridentnet", {"ranges": EVERYWHERE})
    if "r_fcn" in chosen:
        chosen[STAGE_HEAD] = ("faster_rcnn", last_stage_as_head(config.width))
    if "fcos" in chosen:
        chosen["fcos, L1"] = ("fcos", {"box_loss": "l1"})
    return chosen


def last_stage_as_head(width: int) -> dict[str, Any]:
    """Fields of R-FCN's counterpart, whose ResNet has its last stage see each region."""
    backbone = create_model(
        "resnet18",
        depths=(1, 1, 1),
        widths=(width, 2 * width, 3 * width),
        stem_width=width,
        in_channels=1,
        num_classes=0,
        output_stride=8,
    )
    head = StageHead(4 * width, depth=1, stride=1, bottleneck=False, norm="batch")
    maps = {"proposal_maps": ("C4",), "region_maps": ("C4",)}
    return {"backbone": backbone, "head": head, **maps}


def make(config: Config, model: Name, **fields: Any):
    return small_detector(model, num_classes=10, channels=1, width=config.width, **fields)


def train_and_judge(config: Config, model: Name, fields, folder: Path) -> dict[str, float]:
    """Figures of one detector; those of a run that goes on are read where they are there."""
    if (figures := folder / "figures.json").exists():
        return json.loads(figures.read_text())
    detector = make(config, model, **fields)
    variables, seconds = train_detector(config, detector, scenes(config, "train"), folder)
    found = score(config, detector, variables) | {"seconds of training": seconds}
    write_json(figures, found)
    return found


def judge_one_branch(config: Config, folder: Path) -> dict[str, float]:
    """TridentNet that was trained for it, with the middle branch alone."""
    detector = make(config, "tridentnet", ranges=EVERYWHERE, fast=True)
    trained = folder / "tridentnet for one branch"
    variables, _ = train_detector(config, detector, scenes(config, "train"), trained)
    return score(config, detector, variables)


def score(config: Config, detector, variables) -> dict[str, float]:
    batches = data.evaluation_batches(scenes(config, "test"), config.batch_size)
    evaluator, rate = judge(detector, variables, batches, 10, magnified=MAGNIFIED)
    coco = evaluator.coco().figures()
    kept = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {name: coco[name] for name in kept} | {
        "images a second": rate,
        "milliseconds of the head": milliseconds_of_head(detector, variables, next(iter(batches))),
        "parameters": parameters,
    }


def milliseconds_of_head(detector, variables, batch) -> float:
    """What follows the backbone, for an image of a batch: the median of differences."""

    @jax.jit
    def features(variables, images):
        return detector.apply(
            variables, images, method=lambda model, x: model.backbone.features(x, train=False)
        )

    def seconds(function):
        started = time.perf_counter()
        jax.block_until_ready(function(variables, batch["image"]))
        return time.perf_counter() - started

    whole, differences = jax.jit(detector.detect), []
    for _ in range(TURNS + 1):
        differences.append(seconds(whole) - seconds(features))
    return 1000 * statistics.median(differences[1:]) / len(batch["image"])


def conclude(measured: dict[str, dict[str, float]]) -> Result:
    """Each claim held against the numbers, as far as its detectors took part."""
    judged = {name: holds for name, holds in claims(measured).items() if holds is not None}
    figures = {f"{name}: {key}": n for name, of in measured.items() for key, n in of.items()}
    best = max(measured, key=lambda name: measured[name]["ap"])
    return Result(
        claim="; ".join(judged) if judged else "none (not judged: it takes pairs of detectors)",
        source="Lin et al. 2017, arXiv:1612.03144; Dai et al. 2016, arXiv:1605.06409; Li et al. "
        "2019, arXiv:1901.01892; Rezatofighi et al. 2019, arXiv:1902.09630",
        holds=bool(judged) and all(judged.values()),
        measured=figures | judged | {"best": best, "best AP50": measured[best]["ap50"]},
    )


def claims(measured: dict[str, dict[str, float]]) -> dict[str, bool | None]:
    """The four claims; None where a detector is missing."""

    def gain(one, other, key):
        return measured[one][key] - measured[other][key]

    pyramid, single = "faster_rcnn_fpn", "faster_rcnn"
    whole, branch = "tridentnet for one branch", "tridentnet, one branch"
    known = {
        "the pyramid gains most on small digits": (
            (pyramid, single),
            lambda: (
                gain(pyramid, single, "ap_small") > 0
                and gain(pyramid, single, "ap_small") > gain(pyramid, single, "ap_large")
            ),
        ),
        "R-FCN matches Faster R-CNN with a faster head": (
            ("r_fcn", STAGE_HEAD),
            lambda: (
                gain("r_fcn", STAGE_HEAD, "ap") > -CLOSE
                and gain("r_fcn", STAGE_HEAD, "milliseconds of the head") < 0
            ),
        ),
        "TridentNet's single branch keeps most of the gain": (
            (whole, branch, single),
            lambda: 2 * gain(branch, single, "ap") > gain(whole, single, "ap") > 0,
        ),
        "generalized IoU beats L1": (
            ("fcos", "fcos, L1"),
            lambda: gain("fcos", "fcos, L1", "ap") > 0,
        ),
    }
    return {
        claim: bool(holds()) if {*needed} <= {*measured} else None
        for claim, (needed, holds) in known.items()
    }


def draw_figure(folder: Path, measured: dict[str, dict[str, float]]) -> None:
    """Accuracy against speed, and by size of digits."""
    figure = plots.new_figure(width=13.0, height=5.5)
    left, right = figure.subplots(1, 2)
    points = {
        name: ([of["images a second"]], [of["ap"]])
        for name, of in measured.items()
        if of["images a second"] > 0
    }
    if points:
        plots.curve(left, points, "images a second", "AP", logx=True, title="speed and accuracy")
    sizes = ("ap_small", "ap_medium", "ap_large")
    lines = {name: ([0, 1, 2], [of[size] for size in sizes]) for name, of in measured.items()}
    plots.curve(right, lines, "size", "AP", title="by size of the digits")
    right.set_xticks([0, 1, 2], ["small", "medium", "large"])
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
