"""How many random features does a Performer need? Its error against softmax attention.

Claim     The error of FAVOR+ falls as one over the square root of the number of
          features m, and is lower with orthogonal than with independent features
          (Choromanski et al. 2021, "Rethinking Attention with Performers",
          arXiv:2009.14794, theorems 2 and 4 and figure 4, left).
Measured  The root mean square error of the output of bidirectional attention over
          random inputs, relative to that of exact attention, over many draws, for
          positive and trigonometric features; the slope in log-log coordinates.
          The claim is held against the first of `scales`. The variance of one
          feature grows as exp(|q + k|^2 / sqrt(d)), so larger inputs show where it
          stops: as long as a few features dominate, more of them hardly help.
Run       python experiments/performer_error.py            (about half a minute on 2 CPU cores)
          python experiments/performer_error.py --help
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import plots
from jaxmodels.ops import dot_product_attention
from jaxmodels.ops.feature_maps import gaussian_projection, orthogonal_projection
from jaxmodels.ops.performer import performer_attention
from jaxmodels.training.experiment import Result, run

DRAWS = {"orthogonal": orthogonal_projection, "independent": gaussian_projection}
KERNELS = ("positive", "trigonometric")
# How far a fitted slope may be from -1/2: errors at m and 16 m differ by 3 to 5.3.
SLOPE_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    features: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """Numbers of features m."""
    scales: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Standard deviations of the entries of q and k; the claim is about the first."""
    length: int = 256
    width: int = 16
    """Of a head, as in the paper's figure."""
    num_draws: int = 30
    """Independent projections that the mean square error is taken over."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/performer_error/TIME."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    for_inputs, for_draws = jax.random.split(jax.random.key(config.seed))
    projections = {
        name: draw_projections(draw, key, config)
        for (name, draw), key in zip(DRAWS.items(), jax.random.split(for_draws), strict=True)
    }
    errors = {}
    for scale in config.scales:
        inputs = draw_inputs(config, scale, for_inputs)
        for kernel in KERNELS:
            for name, drawn in projections.items():
                errors[scale, kernel, name] = [
                    relative_error(*inputs, drawn[:, :m], kernel) for m in config.features
                ]
    draw_figure(config, folder, errors)
    return conclude(config, errors)


def check(config: Config) -> None:
    """Refuses what no slope could be fitted to."""
    if len(set(config.features)) < 2 or min(config.features) < 1:
        raise ValueError(f"features={config.features}: give two different numbers, at least 1")
    if not config.scales or min(config.scales) <= 0:
        raise ValueError(f"scales={config.scales}: give at least one, above 0")
    for name in ("length", "width", "num_draws"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


def draw_inputs(config: Config, scale: float, key: jax.Array) -> list[jax.Array]:
    """q and k of this scale and v of scale one, the same but for the scale."""
    shape = (1, config.length, 1, config.width)
    scales = (scale, scale, 1.0)
    keys = jax.random.split(key, 3)
    return [s * jax.random.normal(k, shape) for s, k in zip(scales, keys, strict=True)]


def draw_projections(draw: Callable, key: jax.Array, config: Config) -> jax.Array:
    """(draws, m, d) for the largest m; its first rows are a draw for any smaller one."""
    keys = jax.random.split(key, config.num_draws)
    return jax.lax.map(lambda key: draw(key, max(config.features), config.width), keys)


def relative_error(q, k, v, projections: jax.Array, kernel: str) -> float:
    """Root mean square error over draws and entries, over that of the exact output."""
    exact = dot_product_attention(q, k, v)
    squares = squared_errors(q, k, v, exact, projections, kernel)
    return float(np.sqrt(np.mean(squares) / np.mean(np.square(exact))))


@jax.jit(static_argnames="kernel")
def squared_errors(q, k, v, exact, projections: jax.Array, kernel: str) -> jax.Array:
    """Of every draw."""

    def one(projection):
        out, _ = performer_attention(q, k, v, projection, kernel=kernel, causal=False)
        return jnp.mean(jnp.square(out - exact))

    return jax.lax.map(one, projections)


def slope(features: tuple[int, ...], errors: list[float]) -> float:
    return float(np.polyfit(np.log(features), np.log(errors), 1)[0])


def conclude(config: Config, errors: dict[tuple, list[float]]) -> Result:
    """The claim held against the numbers."""
    measured = {}
    for scale in config.scales:
        for kernel in KERNELS:
            label = f"scale_{scale:g}_{kernel}"
            for name in DRAWS:
                line = errors[scale, kernel, name]
                measured[f"{label}_{name}_slope"] = slope(config.features, line)
                measured[f"{label}_{name}_error_{config.features[-1]}"] = line[-1]
            ratios = np.divide(*(errors[scale, kernel, name] for name in DRAWS))
            measured[f"{label}_orthogonal_over_independent"] = float(np.exp(np.log(ratios).mean()))
    first = config.scales[0]
    ours = [errors[first, "positive", name] for name in DRAWS]
    right_slopes = all(abs(slope(config.features, line) + 0.5) <= SLOPE_TOLERANCE for line in ours)
    return Result(
        claim=(
            f"the error of positive features falls as m^(-1/2), within {SLOPE_TOLERANCE} in the "
            f"exponent, and orthogonal ones have the lower error at every m (entries of q and k of "
            f"standard deviation {first:g})"
        ),
        source="Choromanski et al. 2021, arXiv:2009.14794, theorems 2 and 4, figure 4",
        holds=bool(right_slopes and np.all(np.less(*ours))),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, errors: dict[tuple, list[float]]) -> None:
    """A panel for each scale, with the claimed slope to compare with."""
    figure = plots.new_figure(width=4.5 * len(config.scales), height=4.5)
    panels = figure.subplots(1, len(config.scales), squeeze=False)[0]
    for axes, scale in zip(panels, config.scales, strict=True):
        lines = {
            f"{kernel}, {name}": (config.features, errors[scale, kernel, name])
            for kernel in KERNELS
            for name in DRAWS
        }
        start = errors[scale, "positive", "independent"][0]
        ideal = start * np.sqrt(config.features[0] / np.array(config.features))
        plots.curve(
            axes,
            lines | {"proportional to m^(-1/2)": (config.features, ideal)},
            xlabel="features m",
            ylabel="relative error of the output",
            title=f"q, k of standard deviation {scale:g}",
            logx=True,
            logy=True,
        )
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
