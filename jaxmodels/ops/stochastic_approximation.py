"""Roots and means from noisy observations, one at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_within


def incremental_mean(values: Float[Array, "N *B"]) -> Float[Array, "N *B"]:
    """The mean of the first n values, for every n, each from the one before.

    m_n = m_(n-1) + (x_n - m_(n-1)) / n

    No sum is kept, so nothing grows with N, and no value is too large for its dtype
    that the values are not. The state is one mean, in float32 at the least; O(N) in time.

    Args:
      values: one observation a row.

    Returns:
      The running means, in values' dtype; the last one is the mean of all.

    Source: the definition of the mean, solved for the last term; the first case of
    Robbins and Monro 1951, with M(x) = x - E[X] and steps 1/n (see `robbins_monro`).
    """

    def add(mean, numbered):
        count, value = numbered
        mean = mean + (value - mean) / count
        return mean, mean

    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    counts = jnp.arange(1, len(values) + 1, dtype=wide.dtype)
    return lax.scan(add, jnp.zeros_like(wide[0]), (counts, wide))[1].astype(values.dtype)


def power_step_sizes(
    steps: Int[Array, "*B"], power: float | int, scale: float | int = 1.0
) -> Float[Array, "*B"]:
    """Step sizes that fall as a power of the step's number.

    a_n = scale / n^power

    Args:
      steps: the numbers n, the first one 1.
      power: 0 keeps steps constant.
      scale: above 0.

    Returns:
      a_n, float32.

    Raises:
      ValueError: a step below 1, a negative power or a scale that is not positive
        (only seen outside of compiled functions).
    """
    name, most = "power_step_sizes", float("inf")
    require_within(name, "steps", steps, 1, most)
    require_within(name, "power", power, 0, most)
    require_within(name, "scale", scale, 0, most, open_low=True)
    return scale * jnp.asarray(steps, jnp.float32) ** -power


def meets_robbins_monro(power: float) -> bool:
    """Whether `power_step_sizes` go far enough, and become small fast enough.

    sum_n a_n = infinity   and   sum_n a_n^2 < infinity,   that is 1/2 < power <= 1

    The first lets the iterate come from anywhere; the second bounds the sum of all
    noise. Together they suffice for convergence with probability one where the noise
    has a finite variance. The second is not necessary for every noise: the thinner
    its tails, the slower steps may fall.

    Args:
      power: of `power_step_sizes`.

    Source: Robbins and Monro 1951, "A Stochastic Approximation Method"; Blum 1954,
    "Approximation Methods which Converge with Probability One".
    """
    return 0.5 < power <= 1


def robbins_monro(
    measure: Callable[[Any, Any], Any],
    start: Any,
    step_sizes: Float[Array, "N"],
    observations: Any,
) -> Any:
    """Looks for the root of a function that can only be measured with noise.

    x_(n+1) = x_n - a_n Y(x_n, o_n),   E[Y(x, o)] = M(x),   M(root) = 0

    M must rise through its root. Special cases: with Y = x - o and a_n = 1/n the
    incremental mean; with Y the gradient of a loss at the example o, stochastic
    gradient descent; with Y = 1[o <= x] - q, the q-quantile of o. One `lax.scan`.

    Args:
      measure: `(x, observation) -> Y`, of the structure of x.
      start: x_1, an array or any tree of arrays.
      step_sizes: a_n, such as `power_step_sizes`.
      observations: a tree of arrays of N rows, an o_n each: data, or random keys.

    Returns:
      The path: x_2 to x_(N+1), stacked along a new first axis of every array.

    Raises:
      ValueError: observations are not as many as step sizes.

    Source: Robbins and Monro 1951, "A Stochastic Approximation Method",
    Annals of Mathematical Statistics 22(3).
    """
    for leaf in jax.tree.leaves(observations):
        if leaf.shape[:1] != step_sizes.shape:
            raise ValueError(
                f"robbins_monro: observations of shape {leaf.shape} for {step_sizes.shape[0]} "
                "step_sizes; give one row for each"
            )

    def move(x, numbered):
        size, observation = numbered
        x = jax.tree.map(lambda a, y: a - size.astype(a.dtype) * y, x, measure(x, observation))
        return x, x

    return lax.scan(move, start, (step_sizes, observations))[1]
