"""Losses that share their input, each differentiated before the next is computed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

Loss = Callable[[Any, Any, Any], tuple[Float[Array, ""], Any]]


def sum_in_turn(
    loss: Loss, shared: PyTree, own: PyTree, rest: PyTree
) -> tuple[Float[Array, ""], PyTree]:
    """Sums losses of what they share, with the memory of one of them for all gradients.

    total = sum_i loss(shared, own_i, rest_i)

    Differentiating a plain sum runs all losses forward and then all of them
    backward, and holds what each needs until then. Here loss i runs backward at
    once, its gradient of `shared` is added to those before, and what it held is
    free when loss i + 1 begins. Time is that of the plain sum.

    Args:
      loss: `(shared, own_i, rest_i) -> (scalar, auxiliary values)`. It must not close
        over arrays whose gradient is wanted.
      shared: what all losses get; has a gradient.
      own: stacked along a new first axis, a part a loss; has a gradient.
      rest: stacked likewise; has none.

    Returns:
      The sum, and the auxiliary values, stacked, which have no gradient.

    Raises:
      ValueError: own and rest are not stacked alike.

    Source: Gloeckle et al. 2024, "Better & Faster Large Language Models via
    Multi-token Prediction", section 2, figure 2 (arXiv:2404.19737).
    """
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves((own, rest))}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            f"sum_in_turn: own and rest must be stacked, a part a loss along the first axis of "
            f"every leaf, but their first axes are {sorted(counts)}"
        )
    total, auxiliary = _sum(loss, shared, own, rest)
    return total, lax.stop_gradient(auxiliary)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(loss, shared, own, rest):
    def add(total, part):
        value, auxiliary = loss(shared, *part)
        return total + value, auxiliary

    return lax.scan(add, jnp.float32(0), (own, rest))


def _forward(loss, shared, own, rest):
    def add(carry, part):
        of = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, auxiliary), (d_shared, d_own) = of(shared, *part)
        total, sums = carry
        return (total + value, jax.tree.map(jnp.add, sums, d_shared)), (auxiliary, d_own)

    # A loop, because a compiler is free to begin the losses of a plain sum all at once.
    nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, shared)
    (total, d_shared), (auxiliary, d_own) = lax.scan(add, nothing, (own, rest))
    return (total, auxiliary), (d_shared, d_own)


def _backward(loss, gradients, slopes):
    slope, _ = slopes
    return *jax.tree.map(lambda g: slope.astype(g.dtype) * g, gradients), None


_sum.defvjp(_forward, _backward)
