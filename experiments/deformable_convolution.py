"""Does a convolution that may move its taps follow the geometry of what it sees?

Claim     Deformable convolutions recognise objects under strong geometric variation
          better than plain ones, and their taps spread as objects grow (Dai et al.
          2017, "Deformable Convolutional Networks", arXiv:1703.06211, tables 1 and 2
          and figure 6; Zhu et al. 2019, arXiv:1811.11168).
Measured  Two networks of equal size learn handwritten digits that are rotated, scaled
          and sheared anew in every batch. The middle two of their four convolutions
          are deformable in one and plain in the other, which is wider for it; the
          learning rate is the best of three for the plain one. Accuracy on digits held
          out and as strongly deformed, in the mean of the seeds, with the standard
          error of the gain over the digits; and the effective dilation of the
          deformable layers, which is the mean distance of neighbouring taps (a plain
          layer's is 1), where they look at ink of small and of large digits. The
          picture shows all points that one output of the second layer reads.
Found     The taps spread, in both trainings and layers: 1.2 times as wide on digits three
          times as large. The gain in accuracy is too small to tell: 89.5 to 88.9 %,
          one standard error.
Run       python experiments/deformable_convolution.py       (about 3 min on 2 CPU cores)
          python experiments/deformable_convolution.py --help
"""

import dataclasses
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels import data, plots, training
from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.deformable import DeformableConv
from jaxmodels.layers.normalization import batch_norm
from jaxmodels.ops.sampling import bilinear_sample
from jaxmodels.training.experiment import Result, run, trajectory_fields

KINDS = ("deformable", "plain")
LAYERS = ("first", "second")
# Of the features that the layers compared work on, in pixels.
STRIDE = 2
# Digits in the picture, and the scales they are drawn at.
_PICTURED = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    canvas: int = 28
    """Side of the images in pixels; a digit of scale 1 is 8 pixels wide."""
    scales: tuple[float, float] = (1.0, 3.0)
    """Smallest and largest; all between are equally likely on a logarithmic scale."""
    max_angle: float = 60.0
    """Of a rotation either way, in degrees."""
    max_shear: float = 0.5
    width: int = 16
    """Channels of the deformable network; the plain one's follow from its parameters."""
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 1.5e-2
    offset_rate: float = 0.1
    """Of the layers that make offsets, in learning rates; 0.1 in the paper's detectors."""
    warmup: int = 40
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    num_views: int = 5
    """Deformed views of every test digit."""
    seeds: tuple[int, ...] = (0, 1)
    checkpoint_every: int = 200
    log_every: int = 10
    folder: Path | None = None
    """Where results go; by default the last unfinished run of this configuration is
    gone on with, else runs/deformable_convolution/TIME is begun."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    models = {"deformable": Classifier(config.width, deformable=True), "plain": equal_plain(config)}
    right, variables = {}, {}
    for kind, model in models.items():
        for seed in config.seeds:
            variables[kind, seed] = train(config, kind, model, seed, folder)
            right[kind, seed] = test_digits(config, model, variables[kind, seed])
    trained = [variables["deformable", seed] for seed in config.seeds]
    dilations = np.array(
        [
            [effective_dilations(config, models["deformable"], v, s) for s in config.scales]
            for v in trained
        ]
    )
    draw_figure(config, folder, models["deformable"], trained[0])
    sizes = {kind: num_parameters(config, model) for kind, model in models.items()}
    return conclude(right, dilations, sizes)


def check(config: Config) -> None:
    """Refuses what could not be compared."""
    low, high = config.scales
    if not 0 < low < high:
        raise ValueError(f"scales={config.scales}: give a smaller and a larger one, above 0")
    for name in ("width", "num_views", "canvas"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if not config.seeds:
        raise ValueError("seeds=(): give at least one")


class Classifier(nn.Module):
    """Four convolutions, of which the middle two are compared, and the mean over the image.

    Attributes:
      width: channels of the first three; the last has twice as many.
      deformable: kind of the layers compared.
    """

    width: int
    deformable: bool

    @nn.compact
    def __call__(self, image, *, train: bool = False):
        def activate(x):
            return nn.relu(batch_norm("batch", train)(x))

        x = activate(Conv(self.width, 5, stride=STRIDE, use_bias=False, name="down")(image))
        layer = DeformableConv if self.deformable else Conv
        for name in LAYERS:
            x = activate(layer(self.width, 3, use_bias=False, name=name)(x))
        x = activate(Conv(2 * self.width, 3, stride=2, use_bias=False, name="last")(x))
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


def num_parameters(config: Config, model: Classifier) -> int:
    image = jnp.zeros((1, config.canvas, config.canvas, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def equal_plain(config: Config) -> Classifier:
    """The plain network whose parameters are nearest in number."""
    goal = num_parameters(config, Classifier(config.width, deformable=True))
    # Offsets cost 486 w parameters, convolutions 36 w^2, so seven channels more are too many.
    widths = range(config.width, config.width + 8)
    candidates = [Classifier(width, deformable=False) for width in widths]
    return min(candidates, key=lambda model: abs(num_parameters(config, model) - goal))


def place(images, canvas: int, scale, angle=0.0, shear=0.0):
    """Digits in the middle of a canvas, enlarged, then sheared, then turned (in radians).

    Scale, angle and shear are one number for all digits or one for each.
    """
    scale, angle, shear = (jnp.broadcast_to(v, len(images)) for v in (scale, angle, shear))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    slant = jnp.stack(
        [jnp.stack([1 + 0 * shear, shear], -1), jnp.stack([0 * shear, 1 + 0 * shear], -1)], -2
    )
    back = jnp.linalg.inv(turn @ slant) / scale[:, None, None]
    ticks = jnp.arange(canvas) - (canvas - 1) / 2
    pixels = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1)
    middle = (jnp.array(images.shape[2:0:-1]) - 1) / 2
    points = jnp.einsum("bij,yxj->byxi", back, pixels) + middle[None, None, None, :]
    return bilinear_sample(images + 1, points) - 1  # paper is -1


def deform(images, config: Config, key):
    """Each digit with a scale, an angle and a shear of its own."""
    for_scale, for_angle, for_shear = jax.random.split(key, 3)

    def uniform(key, low, high):
        return jax.random.uniform(key, (len(images),), minval=low, maxval=high)

    scale = jnp.exp(uniform(for_scale, *map(np.log, config.scales)))
    angle = np.radians(config.max_angle) * uniform(for_angle, -1, 1)
    shear = config.max_shear * uniform(for_shear, -1, 1)
    return place(images, config.canvas, scale, angle, shear)


def train(config: Config, kind: str, model: Classifier, seed: int, folder: Path):
    """The network's variables after its training."""

    def loss_fn(params, batch, key, model_state):
        variables = {"params": params, **model_state}
        images = deform(batch["image"], config, key)
        logits, model_state = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), {}, model_state

    optimizer = optax.chain(
        training.adamw(
            config.learning_rate,
            steps=config.steps,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        ),
        optax.masked(
            optax.scale(config.offset_rate),
            lambda params: training.decay_mask(params, "offsets/"),
        ),
    )
    example = {"image": jnp.zeros((1, config.canvas, config.canvas, 1))}
    state = training.fit(
        training.init_state(model, optimizer, jax.random.key(seed), example),
        training.make_step(loss_fn, optimizer),
        data.batches(data.digits("train"), config.batch_size, seed=seed),
        steps=config.steps,
        directory=folder / f"{kind}_{seed}",
        config=trajectory_fields(config) | {"kind": kind, "seed": seed},
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        description=f"{kind} {seed}",
    )
    return {"params": state.params, **state.model_state}


def test_digits(config: Config, model: Classifier, variables) -> np.ndarray:
    """How often each test digit is recognised, of views that all networks are tested on."""
    images, labels = data.digits("test").arrays()

    @jax.jit
    def right(key):
        logits = model.apply(variables, deform(jnp.asarray(images), config, key))
        return jnp.argmax(logits, axis=-1) == labels

    # Training draws from keys made of the seeds; these are others.
    keys = jax.random.split(jax.random.key(2**31 - 1), config.num_views)
    return np.mean([right(key) for key in keys], axis=0)


@partial(jax.jit, static_argnums=0)
def offsets_of(model: Classifier, variables, images) -> list:
    """Where each deformable layer sends its taps, (B, V, U, KY, KX, 2) as (dy, dx)."""
    _, seen = model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: module.name == "offsets",
        mutable=["intermediates"],
    )
    made = [seen["intermediates"][name]["offsets"]["__call__"][0] for name in LAYERS]
    return [x[..., :18].reshape(*x.shape[:3], 3, 3, 2) for x in made]


def effective_dilations(config: Config, model: Classifier, variables, scale: float) -> np.ndarray:
    """Mean distance of neighbouring taps in each layer, where there is ink, in steps of a tap."""
    digits, _ = data.digits("test").arrays()
    images = place(jnp.asarray(digits), config.canvas, scale)
    ink = np.asarray(images[:, ::STRIDE, ::STRIDE, 0]) > 0
    found = []
    for offsets in offsets_of(model, variables, images):
        taps = np.asarray(offsets)[ink] + tap_grid()[None]
        sides = [np.linalg.norm(np.diff(taps, axis=axis), axis=-1) for axis in (1, 2)]
        found.append(np.mean([side.mean() for side in sides]))
    return np.array(found)


def tap_grid() -> np.ndarray:
    """(3, 3, 2) offsets (y, x) of a plain kernel's taps from its middle."""
    return np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), axis=-1)


def points_read(offsets: list, row: int, column: int) -> np.ndarray:
    """(81, 2) pixels (y, x) that one output of the second layer reads through the first."""
    first, second = offsets
    points = []
    for tap in (
        np.array([row, column]) + tap_grid().reshape(-1, 2) + second[row, column].reshape(-1, 2)
    ):
        near = np.clip(np.round(tap), 0, np.array(first.shape[:2]) - 1).astype(int)
        points.append(tap + tap_grid().reshape(-1, 2) + first[tuple(near)].reshape(-1, 2))
    return STRIDE * np.concatenate(points)


def conclude(right: dict, dilations: np.ndarray, sizes: dict[str, int]) -> Result:
    """The claim held against digits by (kind, seed), and dilations (seeds, scales, layers)."""
    seeds = sorted({seed for _, seed in right})
    measured = {f"parameters_{kind}": size for kind, size in sizes.items()}
    for (kind, seed), of_digits in right.items():
        measured[f"accuracy_{kind}_seed_{seed}"] = float(of_digits.mean())
    means = {kind: np.mean([right[kind, seed] for seed in seeds], axis=0) for kind in KINDS}
    measured |= {f"accuracy_{kind}": float(mean.mean()) for kind, mean in means.items()}
    gains = means["deformable"] - means["plain"]
    gain, unsure = float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))
    measured |= {"gain": gain, "gain_standard_error": unsure}
    for size, line in zip(("small", "large"), dilations.mean(axis=0), strict=True):
        for name, value in zip(LAYERS, line, strict=True):
            measured[f"dilation_{name}_layer_{size}_digits"] = float(value)
    small, large = dilations.mean(axis=2).T
    measured["dilation_large_over_small"] = float(large.mean() / small.mean())
    return Result(
        claim=(
            "deformable layers recognise deformed digits better than plain ones of equal "
            "parameters, by more than two standard errors, and in every training their taps lie "
            "wider apart on large digits than on small ones"
        ),
        source="Dai et al. 2017, arXiv:1703.06211, tables 1 and 2, figure 6",
        holds=bool(gain > 2 * unsure and np.all(large > small)),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, model: Classifier, variables) -> None:
    """Digits, small and large, with all points that the output in the middle reads."""
    digits, labels = data.digits("test").arrays()
    chosen = [int(np.argmax(labels == label)) for label in range(_PICTURED)]
    figure = plots.new_figure(width=2.2 * _PICTURED, height=4.8)
    panels = figure.subplots(2, _PICTURED)
    middle = (config.canvas - 1) // (2 * STRIDE)
    for row, scale in zip(panels, config.scales, strict=True):
        images = place(jnp.asarray(digits[chosen]), config.canvas, scale)
        first, second = map(np.asarray, offsets_of(model, variables, images))
        for i, axes in enumerate(row):
            plots.image_grid(axes, images[i][None, None], title=f"scale {scale:g}")
            for offsets, color in (((0 * first, 0 * second), 4), ((first, second), 1)):
                y, x = points_read([layer[i] for layer in offsets], middle, middle).T
                axes.plot(x, y, ".", markersize=3, color=plots.PALETTE[color])
            axes.set(xlim=(-0.5, config.canvas - 0.5), ylim=(config.canvas - 0.5, -0.5))
    figure.suptitle(
        "What the middle of the second layer reads (red), and without offsets (yellow)", fontsize=10
    )
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
