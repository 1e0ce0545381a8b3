"""Which digit is where? FCN, U-Net and DeepLab on scenes of handwritten digits.

Claim     Adding maps from before subsampling to a coarse classifier of pixels sharpens
          its outlines: FCN-8s scores above FCN-32s (Long et al. 2015,
          arXiv:1411.4038, section 4.2, figure 4 and table 2), and U-Net's bridges
          serve the same end (Ronneberger et al. 2015, arXiv:1505.04597, section 2).
Measured  Four networks of about half a million parameters, trained equally long on
          scenes of 1 to 4 digits, enlarged 2 to 4 times, on 48 x 48 pixels: pixel
          accuracy, mean pixel accuracy, mean IoU over background and ten digits, and
          frequency-weighted IoU on scenes of other digits, and the accuracy of the
          pixels at an outline and of all others. Maps of the FCNs and of DeepLab v3+
          have strides 1 to 8, a quarter of the papers', as scenes are small:
          `fcn_coarse` knows the last map alone like FCN-32s, `fcn` three maps like
          FCN-8s. Then, trained for fewer steps, U-Nets with each way up, and stacks of
          four dilated convolutions at stride 2 that see equally far, with and without
          holes ("gridding", Wang et al. 2018, arXiv:1702.08502, section 3.2), beside
          one without dilation. One seed: differences of a percent mean little.
Run       python experiments/segment_digits.py            (some 20 min on 2 CPU cores)
          python experiments/segment_digits.py --models unet --upsampling --stacks
                                                            (some 4 min: the U-Net alone)
          python experiments/segment_digits.py --help
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from jaxmodels import create_model, data, plots, training
from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.upsample import Upsample
from jaxmodels.metrics.segmentation import confusion_matrix, segmentation_scores
from jaxmodels.models.vision.deeplab import DeepLabV3Plus
from jaxmodels.models.vision.fcn import FCN
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.ops.dilation import covered_offsets, hybrid_dilations
from jaxmodels.training.experiment import Result, run, trajectory_fields
from jaxmodels.training.files import write_json

NUM_CLASSES, IGNORED = 11, 255
TESTED_AT_ONCE = 50

Model = Literal["fcn_coarse", "fcn", "deeplab", "unet"]
Upsampling = Literal["transposed", "nearest", "bilinear", "pixel_shuffle", "max_unpool"]
StackKind = Literal["plain", "dilated", "hybrid"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    models: tuple[Model, ...] = ("fcn_coarse", "fcn", "deeplab", "unet")
    """Networks to compare; none if the flag has no value, as for the next two."""
    upsampling: tuple[Upsampling, ...] = (
        "transposed",
        "nearest",
        "bilinear",
        "pixel_shuffle",
        "max_unpool",
    )
    """Ways up to compare in U-Nets."""
    stacks: tuple[StackKind, ...] = ("plain", "dilated", "hybrid")
    """Stacks of convolutions to compare."""
    canvas: int = 48
    """Side of the scenes."""
    count: tuple[int, int] = (1, 4)
    """Fewest and most digits in a scene."""
    scale: tuple[float, float] = (2.0, 4.0)
    """Smallest and largest digit, in units of 8 x 8 pixels."""
    test_scenes: int = 500
    width: int = 16
    """Channels of U-Net's first level; the other networks follow."""
    stack_depth: int = 4
    """Layers of the stacks, at stride 2."""
    rate: int = 3
    """Dilation of the dilated stack, and the mean one of the hybrid."""
    ink_weight: float = 2.0
    """Weight in the loss of a digit's pixel; one of the background weighs 1."""
    steps: int = 1600
    """Of training the networks."""
    short_steps: int = 250
    """Of training the U-Nets with other ways up, and the stacks."""
    batch_size: int = 16
    learning_rate: float = 5e-3
    warmup: int = 20
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 20
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/segment_digits/TIME is begun."""


class Stack(nn.Module):
    """A convolution of stride 2, dilated ones, a classifier, and bilinear upsampling."""

    features: int
    dilations: tuple[int, ...]

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(Conv(self.features, 3, stride=2)(images))
        for dilation in self.dilations:
            x = ConvNorm(self.features, 3, dilation=dilation)(x, train=train)
        return Upsample(2, "bilinear")(Conv(NUM_CLASSES, 1)(x), images.shape[1:3])


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trained network on the test scenes."""

    parameters: int
    seconds: dict[str, float]
    predictions: np.ndarray


def main(config: Config, folder: Path) -> Result:
    check(config)
    scenes = test_scenes(config)
    groups = {
        "networks": (networks(config), config.steps),
        "upsampling": (unets(config), config.short_steps),
        "stacks": (stacks(config), config.short_steps),
    }
    trials = {
        group: {
            name: train_and_test(config, model, steps, scenes["image"], folder / group / name)
            for name, model in models.items()
        }
        for group, (models, steps) in groups.items()
    }
    draw_figure(folder, scenes, trials)
    return conclude(config, scenes["mask"], trials)


def check(config: Config) -> None:
    """Refuses what would only fail, or mean nothing, after training."""
    if not (config.models or config.upsampling or config.stacks):
        raise ValueError("models, upsampling and stacks are all empty: give at least one name")
    for name in ("models", "upsampling", "stacks"):
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise ValueError(f"{name}={getattr(config, name)} names one twice")
    for name in ("test_scenes", "width", "stack_depth", "rate", "steps", "short_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.ink_weight <= 0:
        raise ValueError(f"ink_weight={config.ink_weight} must be above 0")


def networks(config: Config) -> dict[str, nn.Module]:
    """Of about equal numbers of parameters."""
    # DeepLab's last stage dilates instead of striding, so its map has stride 4.
    narrow = {"features": 4 * config.width, "low_features": config.width, "rates": (1, 2, 3)}
    known = {
        "fcn_coarse": FCN(backbone(config, 32), NUM_CLASSES, stride=8),
        "fcn": FCN(backbone(config, 32), NUM_CLASSES, stride=2),
        "deeplab": DeepLabV3Plus(backbone(config, 16), NUM_CLASSES, **narrow),
        "unet": unet(config, "transposed"),
    }
    return {name: known[name] for name in config.models}


def unets(config: Config) -> dict[str, nn.Module]:
    return {name: unet(config, name) for name in config.upsampling}


def unet(config: Config, upsampling: Upsampling) -> nn.Module:
    options = {"width": config.width, "depth": 3, "upsampling": upsampling}
    return create_model("unet", num_classes=NUM_CLASSES, in_channels=1, **options)


def backbone(config: Config, output_stride: int) -> ResNet:
    """A ResNet of four blocks whose stem keeps the size; strides 1, 2, 4 and 8."""
    return create_model(
        "resnet18",
        depths=(1, 1, 1, 1),
        widths=tuple(config.width * n // 2 for n in (3, 6, 12, 16)),
        stem_width=config.width,
        stem="cifar",
        in_channels=1,
        num_classes=0,
        output_stride=output_stride,
    )


def dilations(config: Config) -> dict[StackKind, tuple[int, ...]]:
    """Of each layer of a stack."""
    return {
        "plain": (1,) * config.stack_depth,
        "dilated": (config.rate,) * config.stack_depth,
        "hybrid": hybrid_dilations(config.stack_depth, config.rate),
    }


def stacks(config: Config) -> dict[str, nn.Module]:
    return {kind: Stack(2 * config.width, dilations(config)[kind]) for kind in config.stacks}


def scenes_of(config: Config, split: Literal["train", "test"], size: int) -> data.DigitScenes:
    options = {"canvas": (config.canvas,) * 2, "count": config.count, "scale": config.scale}
    return data.digit_scenes(split, size=size, seed=config.seed, **options)


def test_scenes(config: Config) -> dict[str, np.ndarray]:
    scenes = scenes_of(config, "test", config.test_scenes)
    return scenes.batch(np.arange(len(scenes)), np.random.default_rng(0))


def train_and_test(config: Config, model, steps: int, images, folder: Path) -> Trial:
    """The network's map of each test scene."""
    optimizer = training.adamw(
        config.learning_rate,
        steps=steps,
        warmup=min(config.warmup, steps - 1),
        weight_decay=config.weight_decay,
    )
    example = {"images": jnp.zeros((1, *images.shape[1:]))}
    state = training.init_state(model, optimizer, jax.random.key(config.seed), example)
    # No scene is seen twice.
    scenes = scenes_of(config, "train", steps * config.batch_size)
    wall, processor = time.perf_counter(), time.process_time()
    state = training.fit(
        state,
        training.make_step(loss_of(config, model), optimizer),
        data.batches(scenes, config.batch_size, seed=config.seed),
        steps=steps,
        directory=folder,
        config=trajectory_fields(config),
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        description=f"{folder.parent.name}, {folder.name}",
    )
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    # A run that goes on finds this network trained already.
    if not (cost := folder / "cost.json").exists():
        write_json(cost, {"seconds": wall, "processor seconds": processor})
    return Trial(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        seconds=json.loads(cost.read_text()),
        predictions=predict(model, {"params": state.params, **state.model_state}, images),
    )


def loss_of(config: Config, model):
    """Cross-entropy of pixels, weighted as most of them are background."""

    def loss_fn(params, batch, key, model_state):
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(
            variables, batch["image"], train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["mask"])
        weights = jnp.where(batch["mask"] > 0, config.ink_weight, 1.0)
        return jnp.sum(weights * losses) / jnp.sum(weights), {}, model_state

    return loss_fn


def predict(model, variables, images: np.ndarray) -> np.ndarray:
    """The likeliest class of every pixel."""

    @jax.jit
    def classify(images):
        return jnp.argmax(model.apply(variables, images), axis=-1)

    parts = range(0, len(images), TESTED_AT_ONCE)
    return np.concatenate([classify(images[i : i + TESTED_AT_ONCE]) for i in parts])


def at_outlines(masks: np.ndarray) -> np.ndarray:
    """Pixels of (B, Y, X) with one of another class above, below, left or right."""
    found = np.zeros(masks.shape, bool)
    down, across = masks[:, 1:] != masks[:, :-1], masks[:, :, 1:] != masks[:, :, :-1]
    found[:, 1:] |= down
    found[:, :-1] |= down
    found[:, :, 1:] |= across
    found[:, :, :-1] |= across
    return found


def measure(masks: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """The four scores, and the pixel accuracy at outlines and elsewhere."""

    def scores(labels):
        labels, predicted = jnp.asarray(labels), jnp.asarray(predictions)
        return segmentation_scores(confusion_matrix(labels, predicted, NUM_CLASSES))

    of_all, outlines = scores(masks), at_outlines(masks)
    return {
        "PA": of_all.pixel_accuracy,
        "MPA": of_all.mean_pixel_accuracy,
        "MIoU": of_all.mean_iou,
        "FWIoU": of_all.frequency_weighted_iou,
        "PA at outlines": scores(np.where(outlines, masks, IGNORED)).pixel_accuracy,
        "PA elsewhere": scores(np.where(outlines, IGNORED, masks)).pixel_accuracy,
    }


def conclude(config: Config, masks: np.ndarray, trials: dict[str, dict[str, Trial]]) -> Result:
    """Scores of all, and whether the networks with skips beat the one without."""
    found = {
        f"{group}, {name}": measure(masks, trial.predictions)
        | {"parameters": trial.parameters, **trial.seconds}
        for group, of_group in trials.items()
        for name, trial in of_group.items()
    }
    measured = {f"{name}: {key}": n for name, of in found.items() for key, n in of.items()}
    for kind in config.stacks:
        measured[f"stacks, {kind}: share of the field that is read"] = share_read(
            dilations(config)[kind]
        )
    best = max(found, key=lambda name: found[name]["MIoU"])
    measured |= {"best": best, "best MIoU": found[best]["MIoU"]}
    holds = skips_sharpen({name: found[f"networks, {name}"] for name in config.models})
    return Result(
        claim="the FCN with skips and the U-Net have a higher mean IoU than the FCN without, and "
        "gain more accuracy at outlines than elsewhere"
        + (" (not judged: it takes these three models)" if holds is None else ""),
        source="Long et al. 2015, arXiv:1411.4038, section 4.2; Ronneberger et al. 2015, "
        "arXiv:1505.04597, section 2",
        holds=bool(holds),
        measured=measured,
    )


def skips_sharpen(scores: dict[str, dict[str, float]]) -> bool | None:
    """The claim; None without the networks that it is about."""
    if not {"fcn_coarse", "fcn", "unet"} <= set(scores):
        return None

    def gain(name, key):
        return scores[name][key] - scores["fcn_coarse"][key]

    return all(
        gain(name, "MIoU") > 0 and gain(name, "PA at outlines") > gain(name, "PA elsewhere")
        for name in ("fcn", "unet")
    )


def share_read(dilations: tuple[int, ...]) -> float:
    """Share of a stack's receptive field, on its own map, that an output depends on."""
    return float((len(covered_offsets(3, dilations)) / (1 + 2 * sum(dilations))) ** 2)


def draw_figure(folder: Path, scenes, trials: dict[str, dict[str, Trial]]) -> None:
    """Overlays of some test scenes, and the mean IoU of every network."""
    shown = {
        f"{name}, {group}" if group != "networks" else name: trial
        for group, of_group in trials.items()
        for name, trial in of_group.items()
    }
    images, masks = scenes["image"][:8], scenes["mask"]
    rows = {"truth": masks, **{name: trial.predictions for name, trial in shown.items()}}
    figure = plots.new_figure(width=13.0, height=1 + 0.75 * (1 + len(rows)))
    left, right = figure.subplots(1, 2)
    pictures = [np.repeat(images, 3, axis=-1), *(overlay(images, row[:8]) for row in rows.values())]
    plots.image_grid(left, np.stack(pictures), row_labels=["scene", *rows], title="test scenes")
    scores = [measure(masks, trial.predictions)["MIoU"] for trial in shown.values()]
    right.barh(list(shown), scores, color=plots.PALETTE[0])
    right.bar_label(right.containers[0], fmt="%.3f", padding=3, fontsize=9)
    right.invert_yaxis()
    right.set(xlim=(0, 1.1), xlabel="mean IoU on test scenes")
    right.spines[["top", "right"]].set_visible(False)
    plots.save_figure(figure, folder / "figure.png")


def overlay(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Grey scenes with a colour over each digit."""
    colours = np.array([(0, 0, 0), *matplotlib.colormaps["tab10"].colors]) * 2 - 1
    blended = 0.4 * images + 0.6 * colours[masks]
    return np.where(masks[..., None] > 0, blended, images)


if __name__ == "__main__":
    run(main, Config)
