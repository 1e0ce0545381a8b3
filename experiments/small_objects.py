"""What helps a detector to find small digits, and what each remedy costs.

Claim     An image pyramid (Singh and Davis 2018, arXiv:1711.08189, table 1; Girshick 2015,
          arXiv:1504.08083, section 5.2), a feature pyramid (Lin et al. 2017,
          arXiv:1612.03144, tables 1 and 3), dilation in place of striding (Chen et al. 2018,
          arXiv:1606.00915, section 3.1; Li et al. 2018, arXiv:1804.06215) and a higher
          resolution each raise the average precision of small objects.
Measured  Faster R-CNN on one map of stride 16, and with each remedy, trained for equally many
          steps on scenes of digits of 8 to 32 pixels: COCO's AP and AP of small digits (up
          to 10 pixels, as if scenes were three times as large) on scenes of other digits,
          milliseconds an image in inference, and seconds of training. The image pyramid
          trains and searches at scales 1 and 2; the higher resolution at 2 alone. One seed.
Run       python experiments/small_objects.py            (some 20 min on 2 CPU cores)
          python experiments/small_objects.py --help
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from _detectors import MAGNIFIED, Name, judge, scenes, small_detector, train_detector

from jaxmodels import data, plots
from jaxmodels.models.detection.image_pyramid import detect_multi_scale, multi_scale_loss
from jaxmodels.training.experiment import Result, run
from jaxmodels.training.files import write_json

Remedy = Literal["none", "image_pyramid", "feature_pyramid", "dilation", "resolution"]
# The one map of the others: stride 16, or 8 where the stage dilates.
ONE_MAP = {"proposal_maps": ("C4",), "region_maps": ("C4",)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    remedies: tuple[Remedy, ...] = Remedy.__args__
    """What to compare; "none" is the baseline."""
    larger: float = 2.0
    """Factor of the image pyramid and of the higher resolution."""
    canvas: int = 128
    """Side of the scenes."""
    count: tuple[int, int] = (1, 8)
    """Fewest and most digits in a scene."""
    scale: tuple[float, float] = (1.0, 4.0)
    """Smallest and largest digit, in units of 8 x 8 pixels."""
    test_scenes: int = 500
    width: int = 32
    """Channels of the backbone's first stage; the rest follows."""
    steps: int = 1200
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_every: int = 250
    log_every: int = 20
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/small_objects/TIME is begun."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A remedy: the detector, and the scales that it is trained and tested at."""

    model: Name
    fields: dict[str, Any]
    train_scales: tuple[float, ...] = (1.0,)
    test_scales: tuple[float, ...] = (1.0,)


def main(config: Config, folder: Path) -> Result:
    check(config)
    measured = {
        name: train_and_judge(config, trial, folder / name)
        for name, trial in trials(config).items()
    }
    draw_figure(folder, measured)
    return conclude(measured)


def check(config: Config) -> None:
    """Refuses what would only fail, or mean nothing, after training."""
    if len(set(config.remedies)) < len(config.remedies) or len(config.remedies) < 2:
        raise ValueError(f"remedies={config.remedies}: give two names or more, each once")
    if config.larger <= 1:
        raise ValueError(f"larger={config.larger} must be above 1")
    for name in ("steps", "test_scenes", "width"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


def trials(config: Config) -> dict[Remedy, Trial]:
    both, large = (1.0, config.larger), (config.larger,)
    known = {
        "none": Trial("faster_rcnn", ONE_MAP),
        "image_pyramid": Trial("faster_rcnn", ONE_MAP, both, both),
        "feature_pyramid": Trial("faster_rcnn_fpn", {}),
        "dilation": Trial("faster_rcnn", ONE_MAP | {"dilated": True}),
        "resolution": Trial("faster_rcnn", ONE_MAP, large, large),
    }
    return {name: known[name] for name in config.remedies}


def train_and_judge(config: Config, trial: Trial, folder: Path) -> dict[str, float]:
    """Figures of one remedy; those of a run that goes on are read where they are there."""
    if (figures := folder / "figures.json").exists():
        return json.loads(figures.read_text())
    fields = {"width": config.width, **trial.fields}
    model = small_detector(trial.model, num_classes=10, channels=1, **fields)
    loss = partial(multi_scale_loss, model, scales=trial.train_scales)
    train_set = scenes(config, "train")
    variables, seconds = train_detector(config, model, train_set, folder, loss=loss)

    def detect(variables, images, image_sizes):
        return detect_multi_scale(model, variables, images, trial.test_scales, image_sizes)

    batches = data.evaluation_batches(scenes(config, "test"), config.batch_size)
    evaluator, rate = judge(model, variables, batches, 10, magnified=MAGNIFIED, detect=detect)
    coco = evaluator.coco().figures()
    found = {name: coco[name] for name in ("ap", "ap50", "ap_small", "ap_medium", "ap_large")}
    found |= {"milliseconds an image": 1000 / rate, "seconds of training": seconds}
    write_json(figures, found)
    return found


def conclude(measured: dict[str, dict[str, float]]) -> Result:
    """The claim held against the numbers, as far as the baseline took part."""
    figures = {f"{name}: {key}": n for name, of in measured.items() for key, n in of.items()}
    base = measured.get("none")
    gains = {
        name: of["ap_small"] - base["ap_small"]
        for name, of in measured.items()
        if base is not None and name != "none"
    }
    return Result(
        claim="each remedy raises the average precision of small digits"
        + ("" if gains else " (not judged: it takes the detector without any)"),
        source="Singh and Davis 2018, arXiv:1711.08189; Lin et al. 2017, arXiv:1612.03144; Chen "
        "et al. 2018, arXiv:1606.00915",
        holds=bool(gains) and min(gains.values()) > 0,
        measured=figures | {f"{name}: gain in AP small": gain for name, gain in gains.items()},
    )


def draw_figure(folder: Path, measured: dict[str, dict[str, float]]) -> None:
    """Precision by size of digits, and of small ones against time."""
    figure = plots.new_figure(width=12.0, height=5.0)
    left, right = figure.subplots(1, 2)
    sizes = ("ap_small", "ap_medium", "ap_large")
    lines = {name: ([0, 1, 2], [of[size] for size in sizes]) for name, of in measured.items()}
    plots.curve(left, lines, "size", "AP", title="by size of the digits")
    left.set_xticks([0, 1, 2], ["small", "medium", "large"])
    points = {
        name: ([of["milliseconds an image"]], [of["ap_small"]])
        for name, of in measured.items()
        if of["milliseconds an image"] > 0
    }
    if points:
        title = "what it costs"
        plots.curve(right, points, "milliseconds an image", "AP of small digits", title=title)
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
