"""Signals through a hundred layers: initialisers, norms, skips, and learning rates by width.

Claim     Of initialisers only He's keeps the variance through ReLU layers (He et al.
          2015, arXiv:1502.01852, equations 10 and 14); norms keep it with any, but batch
          norm's gradients grow by pi / (pi - 1) a layer (Yang et al. 2019,
          arXiv:1902.08129). A first step of training changes a post-norm network the
          more, the deeper it is; with DeepNorm it does not (Wang et al. 2022,
          arXiv:2203.00555). In the parameterisation of the neural tangent kernel the
          best learning rate does not depend on the width; in the standard one it falls,
          as 1 / width in the limit (Jacot et al. 2018, arXiv:1806.07572).
Measured  Mean squares of activations, and of gradients in them, layer by layer, against
          closed forms; the exponent of depth in the change of the output that a small
          step of gradient descent makes; the exponent of width in the learning rate
          that ends at the lowest loss, on digits.
Run       python experiments/signal_propagation.py            (about 2 min on 2 CPU cores)
          python experiments/signal_propagation.py --help
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels import data, plots
from jaxmodels.layers.deep_norm import DeepNorm, deep_norm_scales
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.ntk import NTKLinear
from jaxmodels.training.experiment import Result, run

INITIALISERS: dict[str, tuple[Callable, float]] = {
    **{
        f"{name} {distribution}": (
            nn.initializers.variance_scaling(scale, mode, distribution),
            scale,
        )
        for name, scale, mode in (
            ("LeCun", 1.0, "fan_in"),
            ("Xavier", 1.0, "fan_avg"),
            ("He", 2.0, "fan_in"),
        )
        for distribution in ("uniform", "normal", "truncated_normal")
    },
    "orthogonal": (nn.initializers.orthogonal(), 1.0),
    "orthogonal, gain sqrt 2": (nn.initializers.orthogonal(math.sqrt(2)), 2.0),
}
"""By name, with width * variance of the kernel of a square layer."""

# Norms are shown with kernels that lose half of the signal in every layer without them.
WITH_NORMS = "LeCun normal"

NORMS: dict[str, nn.Module | None] = {
    "none": None,
    "batch": nn.BatchNorm(use_running_average=False),
    "layer": nn.LayerNorm(),
    "rms": nn.RMSNorm(),
    "group": nn.GroupNorm(num_groups=8),
}
SKIPS = ("no norm", "pre-norm", "post-norm", "DeepNorm")
RATES = 2.0 ** np.arange(-8.5, 1.51, 0.5)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    depth: int = 100
    """Layers, or residual blocks of two layers."""
    width: int = 256
    batch_size: int = 64
    draws: int = 8
    """Initialisations that logarithms are averaged over."""
    depths: tuple[int, ...] = (6, 12, 25, 50, 100)
    """Of the residual networks that take a step."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Of the networks whose learning rate is sought."""
    steps: int = 30
    """Of gradient descent, for each learning rate and seed."""
    seeds: int = 4
    """Whose losses are averaged; that of a run that diverges is infinite."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/signal_propagation/TIME."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    key = jax.random.key(config.seed)
    found = {
        "initialisers": {name: plain(config, name, "none", key) for name in INITIALISERS},
        "norms": {name: plain(config, WITH_NORMS, name, key) for name in NORMS},
        "skips": {name: residual(config, name, config.depth, key)[0] for name in SKIPS},
        "changes": {
            name: [float(residual(config, name, depth, key)[1]) for depth in config.depths]
            for name in SKIPS[1:]
        },
        "rates": {
            name: [final_losses(config, name, width) for width in config.widths]
            for name in ("standard", "tangent")
        },
    }
    found = jax.tree.map(np.asarray, found)
    draw_figure(config, folder, found)
    return conclude(config, found)


def check(config: Config) -> None:
    """Refuses what no trend could be fitted to."""
    if config.depth < 4 or config.width % 8 or config.width < 8:
        raise ValueError(
            f"depth={config.depth}, width={config.width}: give at least 4 layers and a width that "
            "8 divides"
        )
    for name in ("depths", "widths"):
        values = getattr(config, name)
        if len({*values}) < 2 or min(values) < 1:
            raise ValueError(f"{name}={values}: give two different numbers, at least 1")
    if min(config.batch_size, config.draws, config.steps, config.seeds) < 1:
        raise ValueError("batch_size, draws, steps and seeds must be at least 1")


def normalise(norm: nn.Module | None, x: jax.Array) -> jax.Array:
    """A fresh norm's output: its scale is 1 and its bias 0."""
    return x if norm is None else norm.init_with_output(jax.random.key(0), x)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def plain(config: Config, initialiser: str, norm: str, key: jax.Array):
    """Mean squares by layer, (depth,), of x -> relu(norm(W x)) and of gradients in it.

    Geometric means over draws, because products of many random factors have heavy tails.
    """
    draw, module = INITIALISERS[initialiser][0], NORMS[norm]
    shape = (config.batch_size, config.width)

    def forward(nudges, x, keys):
        def layer(x, drawn):
            key, nudge = drawn
            kernel = draw(key, (config.width, config.width))
            x = nn.relu(normalise(module, x @ kernel)) + nudge
            return x, jnp.square(x).mean()

        return jax.lax.scan(layer, x, (keys, nudges))

    def one(key):
        for_x, for_out, for_kernels = jax.random.split(key, 3)
        keys = jax.random.split(for_kernels, config.depth)
        # A gradient in what is added to a layer is the gradient in that layer.
        nudges = jnp.zeros((config.depth, *shape))
        x, direction = jax.random.normal(for_x, shape), jax.random.normal(for_out, shape)
        _, back, squares = jax.vjp(lambda n: forward(n, x, keys), nudges, has_aux=True)
        return jnp.log(squares), jnp.log(jnp.square(back(direction)[0]).mean(axis=(1, 2)))

    # Orthogonal kernels take long to draw, and hardly differ in what they do to a norm.
    draws = 1 if "orthogonal" in initialiser else config.draws
    logs = jax.lax.map(one, jax.random.split(key, draws))
    return jax.tree.map(lambda log: jnp.exp(log.mean(axis=0)), logs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def residual(config: Config, skip: str, depth: int, key: jax.Array):
    """Mean squares by block, and how far a small step of descent moves the output.

    The output is normalised, its loss a random direction; the change is that for an
    infinitesimal learning rate, divided by it: |J J^T direction| a picture.
    """
    width, size = config.width // 2, (config.batch_size, config.width // 2)
    deep = DeepNorm(depth)
    gain = deep_norm_scales(depth)[1] if skip == "DeepNorm" else 1.0

    def block(x, kernels):
        inner = normalise(nn.LayerNorm(), x) if skip == "pre-norm" else x
        branch = nn.relu(inner @ kernels[0]) @ kernels[1]
        if skip == "DeepNorm":
            x = deep.init_with_output(jax.random.key(0), x, branch)[0]
        else:
            x = normalise(nn.LayerNorm() if skip == "post-norm" else None, x + branch)
        return x, jnp.square(x).mean()

    def one(key):
        for_x, for_out, *for_kernels = jax.random.split(key, 4)
        draws = nn.initializers.he_normal(), nn.initializers.lecun_normal()
        kernels = [
            gain
            * jax.vmap(lambda key, draw=draw: draw(key, (width, width)))(
                jax.random.split(key, depth)
            )
            for draw, key in zip(draws, for_kernels, strict=True)
        ]
        x, direction = jax.random.normal(for_x, size), jax.random.normal(for_out, size)
        x = normalise(nn.LayerNorm(), x)

        def output(kernels):
            out, squares = jax.lax.scan(block, x, kernels)
            return normalise(nn.LayerNorm(), out), squares

        _, back, squares = jax.vjp(output, kernels, has_aux=True)
        step = back(direction / config.batch_size)
        _, change, _ = jax.jvp(output, (kernels,), step, has_aux=True)
        return jnp.log(squares), jnp.log(optax.tree.norm(change) / config.batch_size**0.5)

    logs = jax.lax.map(one, jax.random.split(key, config.draws))
    return jax.tree.map(lambda log: jnp.exp(log.mean(axis=0)), logs)


def network(parameterisation: str, width: int) -> nn.Module:
    """Two hidden layers for the digits; alike at first, whichever the parameterisation."""
    if parameterisation == "tangent":
        layer = functools.partial(NTKLinear, weight_scale=math.sqrt(2), bias_scale=0.0)
    else:
        layer = functools.partial(Linear, use_bias=False, kernel_init=nn.initializers.he_normal())
    return nn.Sequential([layer(width), nn.relu, layer(width), nn.relu, layer(10)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(config: Config, parameterisation: str, width: int, rates, images, labels):
    """By learning rate the mean loss of the last tenth of the steps; NaN is divergence."""
    model = network(parameterisation, width)
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)

    # Squared: its curvature is that of the network, where that of cross-entropy falls
    # as predictions become sure, and hides at which rate descent is no longer stable.
    def loss(params, picked):
        wanted = jax.nn.one_hot(labels[picked], 10)
        return optax.squared_error(model.apply(params, images[picked]), wanted).sum(axis=1).mean()

    def one(rate, key):
        def step(params, key):
            picked = jax.random.randint(key, (config.batch_size,), 0, len(labels))
            value, grads = jax.value_and_grad(loss)(params, picked)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

        for_start, for_steps = jax.random.split(key)
        start = model.init(for_start, images[:1])
        losses = jax.lax.scan(step, start, jax.random.split(for_steps, config.steps))[1]
        return losses[-max(1, config.steps // 10) :].mean()

    return jax.lax.map(lambda rate: jax.vmap(one, (None, 0))(rate, keys).mean(), rates)


def final_losses(config: Config, parameterisation: str, width: int) -> jax.Array:
    """By learning rate; infinite where training diverged."""
    images, labels = data.digits("train").arrays()
    images = images.reshape(len(labels), -1) / np.sqrt(np.square(images).mean())
    losses = train(config, parameterisation, width, jnp.asarray(RATES), images, labels)
    return jnp.where(jnp.isfinite(losses), losses, jnp.inf)


def exponent(sizes, values) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def factor(squares: np.ndarray) -> float:
    """By which mean squares change from layer to layer."""
    return float(np.exp(np.diff(np.log(squares)).mean()))


def lasts(squares: np.ndarray) -> bool:
    """Within a factor of 30, which the finite width alone may make of a hundred layers."""
    return bool(1 / 30 < squares[-1] / squares[0] < 30)


def conclude(config: Config, found: dict) -> Result:
    """The claim held against the numbers."""
    measured: dict[str, float] = {}
    holds = []
    for name, (squares, _) in found["initialisers"].items():
        closed = INITIALISERS[name][1] / 2
        # Below this, float32 holds no more of the signal.
        measured[f"{name}: factor a layer"] = factor(squares[squares > 1e-30])
        measured[f"{name}: last over first"] = float(squares[-1] / squares[0])
        holds.append(abs(measured[f"{name}: factor a layer"] / closed - 1) < 0.03)
        holds.append(lasts(squares) == (closed == 1))
    for name, (squares, gradients) in found["norms"].items():
        growth = 1 / factor(gradients[gradients > 1e-30])
        measured[f"{name} norm: activations, last over first"] = float(squares[-1] / squares[0])
        measured[f"{name} norm: factor of gradients a layer back"] = growth
        if NORMS[name] is not None:
            closed = math.pi / (math.pi - 1) if name == "batch" else 1
            holds += [lasts(squares), abs(growth / closed - 1) < 0.05]
    for name, squares in found["skips"].items():
        measured[f"{name}: blocks, last mean square"] = float(squares[-1])
    for name, changes in found["changes"].items():
        measured[f"{name}: exponent of depth in a step's change"] = exponent(config.depths, changes)
    deep, post = (exponent(config.depths, found["changes"][n]) for n in ("DeepNorm", "post-norm"))
    best = {name: RATES[np.argmin(losses, axis=1)] for name, losses in found["rates"].items()}
    for name, rates in best.items():
        measured[f"{name}: exponent of width in the best rate"] = exponent(config.widths, rates)
    standard, tangent = (exponent(config.widths, best[n]) for n in ("standard", "tangent"))
    holds += [post > 0.5 > 0.25 > abs(deep), standard < -0.5 and abs(tangent) < 0.25]
    return Result(
        claim=(
            f"through {config.depth} ReLU layers only kernels of variance 2 / width keep the "
            "signal, norms do with any, batch norm at the price of gradients; a step changes "
            "DeepNorm as much at any depth; the tangent parameterisation has one best rate"
        ),
        source="arXiv:1502.01852; arXiv:1902.08129; arXiv:2203.00555; arXiv:1806.07572",
        holds=all(map(bool, holds)),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, found: dict) -> None:
    """Six panels: activations, gradients, skips, changes and learning rates."""
    figure = plots.new_figure(width=17.0, height=9.0)
    axes = figure.subplots(2, 3).ravel()
    layers = np.arange(1, config.depth + 1)

    def draw(axes, lines, y, title, x="layer"):
        """As logarithms, because thirty decades have no readable logarithmic axis."""
        logs = {name: (layers[line > 0], np.log10(line[line > 0])) for name, line in lines.items()}
        plots.curve(axes, logs, x, f"log10 of the mean square of {y}", title=title)

    first = {name: squares for name, (squares, _) in found["initialisers"].items()}
    draw(axes[0], first, "activations", "initialisers, ReLU")
    for at, which, what in ((1, 0, "activations"), (2, 1, "gradients")):
        lines = {name: pair[which] for name, pair in found["norms"].items()}
        draw(axes[at], lines, what, f"norms: {what}")
    draw(axes[3], found["skips"], "blocks", "skips", x="block")
    depths = np.array(config.depths)
    lines = {name: (depths, np.array(changes)) for name, changes in found["changes"].items()}
    title = "skips: a first step"
    plots.curve(axes[4], lines, "depth", "change / rate", logx=True, logy=True, title=title)
    lines = {}
    for name, at in itertools.product(found["rates"], (0, len(config.widths) - 1)):
        losses = found["rates"][name][at]
        if (ended := np.isfinite(losses)).any():
            lines[f"{name}, width {config.widths[at]}"] = np.log2(RATES[ended]), losses[ended]
    title = "learning rates, up to divergence"
    plots.curve(
        axes[5], lines, "log2 of the learning rate", "loss at the end", logy=True, title=title
    )
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
