"""Experts on rows sorted by expert, for CPUs: a loop over experts and blocks of rows.

A block's rows may reach into those of the next expert. That expert comes later and
writes them again, so nothing needs padding to whole blocks but the very end. Experts
without rows are passed by, and their matrices not read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# An expert's rows are taken in blocks of the first size while they last, then of the second:
# small products are slow, and large ones of which most rows belong to others are wasted.
_WHOLE, _REST = 128, 32


@jax.custom_vjp
def blocked_swiglu(
    rows: Float[Array, "M D"],
    load: Int[Array, "E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "M D"]:
    """Each row through its expert's SwiGLU.

    out_m = down_e (silu(gate_e x_m) * up_e x_m)

    Args:
      rows: sorted by expert.
      load: how many rows each expert has.
      gate, up, down: an expert's three matrices along the first axis.

    Returns:
      An array of the shape and dtype of rows.
    """
    return _forward(rows, load, gate, up, down)[0]


def _forward(rows, load, gate, up, down):
    x = _with_room(rows)
    # zeros_like, so that it varies over the axes of a shard_map as x does.
    blank = jnp.zeros_like(x, shape=(len(x), gate.shape[-1]))

    def expert(e, start, end, carry):
        gate_e, up_e, down_e = gate[e], up[e], down[e]

        def block(carry, at, size):
            out, gates, ups = carry
            here = _block(x, at, size)
            g, u = here @ gate_e, here @ up_e
            y = (jax.nn.silu(g) * u) @ down_e
            return _put(out, y, at), _put(gates, g, at), _put(ups, u, at)

        return _over_blocks(start, end, len(rows), block, carry)

    out, gates, ups = _over_experts(load, expert, (jnp.zeros_like(x), blank, blank))
    return out[: len(rows)], (x, gates, ups, load, gate, up, down)


def _backward(kept, cotangent):
    x, gates, ups, load, gate, up, down = kept
    dy = _with_room(cotangent)

    def expert(e, start, end, carry):
        gate_t, up_t, down_t = gate[e].T, up[e].T, down[e].T

        def block(carry, at, size):
            dx, d_gate, d_up, d_down = carry
            here, g, u, dy_here = (_block(a, at, size) for a in (x, gates, ups, dy))
            # Rows of the next expert add nothing to this one's matrices.
            dy_here = jnp.where((at + jnp.arange(size) < end)[:, None], dy_here, 0)
            hidden, pull = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)
            dg, du = pull(dy_here @ down_t)
            dx = _put(dx, dg @ gate_t + du @ up_t, at)
            d_gate, d_up = d_gate.at[e].add(here.T @ dg), d_up.at[e].add(here.T @ du)
            return dx, d_gate, d_up, d_down.at[e].add(hidden.T @ dy_here)

        return _over_blocks(start, end, len(cotangent), block, carry)

    carry = tuple(jnp.zeros_like(a) for a in (x, gate, up, down))
    dx, *d_matrices = _over_experts(load, expert, carry)
    return dx[: len(cotangent)], None, *d_matrices


blocked_swiglu.defvjp(_forward, _backward)


def _over_experts(load: Int[Array, "E"], expert: Callable[..., Any], carry: Any) -> Any:
    """`carry = expert(e, start, end, carry)` for every expert that has rows, in order."""
    ends = jnp.cumsum(load)
    busy = jnp.argsort(load == 0, stable=True)

    def one(i, carry):
        e = busy[i]
        return expert(e, ends[e] - load[e], ends[e], carry)

    return lax.fori_loop(0, jnp.sum(load > 0), one, carry)


def _over_blocks(
    start: Int[Array, ""],
    end: Int[Array, ""],
    num_rows: int,
    block: Callable[[Any, Int[Array, ""], int], Any],
    carry: Any,
) -> Any:
    """`carry = block(carry, at, size)` over blocks that cover the rows from start to end."""
    rest = ((min(_REST, num_rows), end),)
    whole = ((_WHOLE, end - _WHOLE + 1),) if num_rows >= _WHOLE else ()
    for size, stop in whole + rest:
        start, carry = lax.while_loop(
            lambda c, stop=stop: c[0] < stop,
            lambda c, size=size: (c[0] + size, block(c[1], c[0], size)),
            (start, carry),
        )
    return carry


def _with_room(rows):
    return jnp.pad(rows, ((0, min(_REST, len(rows))), (0, 0)))


def _block(rows, at, size):
    return lax.dynamic_slice_in_dim(rows, at, size)


def _put(rows, block, at):
    return lax.dynamic_update_slice_in_dim(rows, block, at, axis=0)
