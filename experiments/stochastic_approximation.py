"""Which step sizes find a root through noise: the two conditions of Robbins and Monro.

Claim     Steps a_n with sum a_n = infinity and sum a_n^2 < infinity bring the iterate to
          the root with probability one, whatever the noise of finite variance (Robbins
          and Monro 1951, Annals of Mathematical Statistics 22(3); Blum 1954, the same
          25(2)); without either, noise exists for which it does not come or stay.
Measured  The farthest that the iterate is from the root within each octave of steps
          (what must fall to zero for convergence with probability one), its median
          over many runs with a_n = scale / n^power, for M(x) = x - root and noise of
          finite variance but heavy tails: P(|noise| > t) = t^(-tail). Then steps with
          power <= 1 / tail admit excursions for ever, although the mean square error
          falls. And two cases of the method: the incremental mean against float64, and
          stochastic gradient descent on least squares (diabetes, 442 patients) against
          the solution of the normal equations, its path averaged or not.
Run       python experiments/stochastic_approximation.py          (about 15 s on 2 CPU cores)
          python experiments/stochastic_approximation.py --tail 10
          python experiments/stochastic_approximation.py --help
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import plots
from jaxmodels.ops.stochastic_approximation import (
    incremental_mean,
    meets_robbins_monro,
    power_step_sizes,
    robbins_monro,
)
from jaxmodels.training.experiment import Result, run

# A median that falls less than this in the exponent of n has not been seen to fall.
FALLS = -0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    powers: tuple[float, ...] = (0.0, 0.3, 0.75, 1.0, 1.5)
    """Of the step sizes; those above 1/2 and up to 1 meet both conditions."""
    scale: float = 0.6
    """Of the step sizes."""
    tail: float = 2.2
    """Exponent of the tails of the noise, above 2 for a finite variance."""
    distance: float = 30.0
    """From the start to the root."""
    num_runs: int = 128
    octaves: int = 17
    """So many doublings of the number of steps."""
    descent_powers: tuple[float, ...] = (0.0, 0.75, 1.0, 1.5)
    """Of the step sizes of gradient descent."""
    epochs: int = 200
    """Of gradient descent over the patients."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/stochastic_approximation/TIME."""


def main(config: Config, folder: Path) -> Result:
    check(config)
    for_roots, for_mean, for_descent = jax.random.split(jax.random.key(config.seed), 3)
    farthest = {p: farthest_by_octave(config, p, for_roots) for p in config.powers}
    descent = {
        (power, averaged): descent_errors(config, power, averaged, for_descent)
        for power in config.descent_powers
        for averaged in (False, True)
    }
    draw_figure(config, folder, farthest, descent)
    return conclude(config, farthest, descent, mean_error(for_mean))


def check(config: Config) -> None:
    """Refuses what nothing could be seen in."""
    if config.tail <= 2:
        raise ValueError(f"tail={config.tail}: the variance is finite above 2 only")
    if config.octaves < 8:
        raise ValueError(f"octaves={config.octaves}: give at least 8, a trend is fitted to half")
    for name in ("scale", "distance", "num_runs", "epochs"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive")
    if not config.powers or not all(power >= 0 for power in config.powers):
        raise ValueError(f"powers={config.powers}: give at least one, none below 0")


def heavy_noise(key: jax.Array, shape: tuple[int, ...], tail: float) -> jax.Array:
    """Symmetric, P(|noise| > t) = t^(-tail) for t >= 1; the variance is tail / (tail - 2)."""
    for_size, for_sign = jax.random.split(key)
    size = jax.random.uniform(for_size, shape, minval=jnp.finfo(jnp.float32).tiny) ** (-1 / tail)
    return size * jax.random.rademacher(for_sign, shape, jnp.float32)


def farthest_by_octave(config: Config, power: float, key: jax.Array) -> np.ndarray:
    """(octaves, runs): the farthest from the root among the steps 2^k to 2^(k+1) - 1."""
    x, found = jnp.full(config.num_runs, config.distance), []
    for number in range(config.octaves):
        steps = jnp.arange(2**number, 2 ** (number + 1))
        sizes = power_step_sizes(steps, power, config.scale)
        x, farthest = octave(x, sizes, jax.random.fold_in(key, number), config.tail)
        found.append(farthest)
    return np.stack(found)


@jax.jit
def octave(x, sizes, key, tail):
    """The iterates of all runs at the end, and how far they were from the root, 0, at the most."""
    noise = heavy_noise(key, (len(sizes), len(x)), tail)
    path = robbins_monro(jnp.add, x, sizes, noise)
    return path[-1], jnp.abs(path).max(axis=0)


def exponent(farthest: np.ndarray) -> float:
    """Of n, as the median over runs goes with it in the second half of the octaves."""
    medians = np.log2(np.median(farthest, axis=1))
    late = np.arange(len(medians) // 2, len(medians))
    return float(np.polyfit(late, medians[late], 1)[0])


def mean_error(key: jax.Array, count: int = 100_000) -> float:
    """The largest error of a running mean in float32, relative to the values' deviation."""
    values = 100 + jax.random.normal(key, (count,))
    exact = np.cumsum(np.asarray(values, np.float64)) / np.arange(1, count + 1)
    return float(np.abs(np.asarray(incremental_mean(values), np.float64) - exact).max())


def least_squares() -> tuple[np.ndarray, np.ndarray]:
    """Whitened measurements with a constant, and the disease's progress."""
    from sklearn.datasets import load_diabetes

    inputs, targets = load_diabetes(return_X_y=True)
    # Whitened, all directions are equally steep, as the one of the first problem is.
    inputs = np.linalg.svd(inputs, full_matrices=False)[0] * np.sqrt(len(inputs))
    return np.insert(inputs, 0, 1, axis=1), (targets - targets.mean()) / targets.std()


def descent_errors(config: Config, power: float, averaged: bool, key: jax.Array) -> np.ndarray:
    """(epochs,): excess mean square error over the closed form's, of one example a step."""
    inputs, targets = least_squares()
    best = np.linalg.lstsq(inputs, targets, rcond=None)[0]
    order = jax.random.randint(key, (config.epochs * len(targets),), 0, len(targets))
    # No step is larger than the longest example allows; the conditions look at the end only.
    largest = 1 / np.square(inputs).sum(axis=1).max()
    sizes = power_step_sizes(jnp.arange(1, len(order) + 1), power, config.scale)
    sizes = jnp.minimum(sizes, largest)

    def gradient(weights, example):
        x, y = example
        return x * (x @ weights - y)

    data = jnp.asarray(inputs, jnp.float32)[order], jnp.asarray(targets, jnp.float32)[order]
    path = robbins_monro(gradient, jnp.zeros(inputs.shape[1]), sizes, data)
    path = incremental_mean(path) if averaged else path
    ends = np.asarray(path[len(targets) - 1 :: len(targets)], np.float64)
    return np.square((ends - best) @ inputs.T).mean(axis=1)


def conclude(config: Config, farthest, descent, error_of_mean: float) -> Result:
    """The claim held against the numbers."""
    measured: dict[str, float | bool] = {"error_of_the_incremental_mean": error_of_mean}
    as_said = []
    for power, distances in farthest.items():
        slope, last = exponent(distances), float(np.median(distances[-1]))
        measured[f"power_{power:g}_exponent_of_the_farthest"] = slope
        measured[f"power_{power:g}_farthest_in_the_last_octave"] = last
        as_said.append((slope < FALLS) == meets_robbins_monro(power))
    for (power, averaged), errors in descent.items():
        label = "averaged" if averaged else "last"
        measured[f"descent_power_{power:g}_{label}_excess_error"] = float(errors[-1])
    return Result(
        claim=(
            "of step sizes scale / n^power those that meet both conditions converge with "
            f"probability one under noise of tail exponent {config.tail:g}, and the others do not"
        ),
        source="Robbins and Monro 1951, Ann. Math. Stat. 22(3); Blum 1954, 25(2)",
        holds=all(as_said),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, farthest, descent) -> None:
    """Distances to the root and to the least squares solution."""
    figure = plots.new_figure(width=12.0, height=4.8)
    left, right = figure.subplots(1, 2)
    octaves = np.arange(config.octaves)
    plots.curve(
        left,
        {
            f"power {power:g}" + ("" if meets_robbins_monro(power) else ", a condition fails"): (
                octaves,
                np.median(distances, axis=1),
            )
            for power, distances in farthest.items()
        },
        "octave: steps 2^k to 2^(k + 1) - 1",
        "farthest from the root, median of runs",
        logy=True,
    )
    epochs = np.arange(1, config.epochs + 1)
    lines = {
        f"power {power:g}" + (", averaged" if averaged else ""): (epochs, errors)
        for (power, averaged), errors in descent.items()
    }
    title = "gradient descent on least squares, steps capped"
    plots.curve(
        right, lines, "epoch", "error above the closed form's", logx=True, logy=True, title=title
    )
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
