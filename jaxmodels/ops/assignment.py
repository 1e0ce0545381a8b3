"""The cheapest way to pair things off."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from optax.assignment import hungarian_algorithm


def assign_one_to_one(costs: Float[Array, "N M"]) -> Int[Array, "N"]:
    """Pairs every row with a column of its own, or the reverse, at the least total cost.

    minimises sum_n costs[n, out[n]]  over all out that pair as many as can be,
    no column twice

    By the Hungarian algorithm, in O(min(N, M)^2 max(N, M)) dependent steps, so it suits
    hundreds of rows, not thousands. Columns that stand for nothing, as the padding of
    objects, change nothing for the others if their cost is the same for all rows and
    there are no fewer rows than columns.

    Args:
      costs: any finite numbers; infinity forbids a pair.

    Returns:
      The column of every row, -1 for those that are left over.

    Raises:
      ValueError: a cost is NaN or minus infinity (which forbid a pair, too, in compiled
        code, where they cannot be seen).

    Source: Kuhn 1955, "The Hungarian Method for the Assignment Problem"; what detectors
    use it for, Carion et al. 2020, "DETR", section 3.1 (arXiv:2005.12872).
    """
    _check(costs)
    allowed = jnp.isfinite(costs)
    # One forbidden pair is to cost more than any assignment without.
    worst = jnp.max(jnp.abs(costs), where=allowed, initial=0)
    forbidden = (2 * worst + 1) * (min(costs.shape) + 1)
    rows, columns = hungarian_algorithm(jnp.where(allowed, costs, forbidden))
    found = jnp.where(allowed[rows, columns], columns, -1)
    return jnp.full(len(costs), -1, found.dtype).at[rows].set(found)


def _check(costs: jax.Array) -> None:
    if isinstance(costs, jax.core.Tracer):
        return
    bad = np.isnan(costs) | np.isneginf(costs)
    if bad.any():
        n, m = np.argwhere(bad)[0]
        raise ValueError(
            f"assign_one_to_one: costs[{n}, {m}] = {costs[n, m]:g} can be neither paid nor "
            f"avoided; pass a finite number, or inf to forbid the pair"
        )
