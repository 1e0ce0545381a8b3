"""Many feed-forwards of which every token sees a few."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops import float8
from jaxmodels.ops.activations import swiglu
from jaxmodels.ops.experts_blocked import blocked_swiglu
from jaxmodels.ops.platform import platform
from jaxmodels.ops.routing import expert_load


def dropless_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    implementation: Literal["auto", "ragged", "blocked"] = "auto",
) -> Float[Array, "N D"]:
    """The weighted sum of the experts that each token chose; none is dropped.

    out_n = sum_k w_nk f_e(x_n),  e = experts_nk
    f_e(x) = down_e (silu(gate_e x) * up_e x)

    The N K pairs of token and expert are sorted by expert, and each expert meets
    its tokens as one matrix. Work is that of N K tokens, whatever E.

    Args:
      x: tokens.
      weights, experts: from `routing.top_k_routing`.
      gate, up, down: an expert's three matrices along the first axis.
      implementation: "ragged" is XLA's grouped product, which on CPU multiplies
        every token by every expert; "blocked" a loop over experts and blocks of
        rows; "auto" is blocked on CPU, but for products of eight bits, and ragged
        elsewhere.

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: shapes disagree, an unknown implementation, or "blocked" where products
        of eight bits are asked for.

    Source: Gale et al. 2022, "MegaBlocks", section 4 (arXiv:2211.15841); SwiGLU
    experts from Jiang et al. 2024, equation 1 (arXiv:2401.04088).
    """
    _check_matrices("dropless_experts", x, gate, up, down)
    if not weights.shape == experts.shape == (len(x), experts.shape[-1]):
        raise ValueError(
            f"dropless_experts: weights {weights.shape} and experts {experts.shape} must both be "
            f"(N, K) with N = {len(x)} tokens, as top_k_routing gives them"
        )
    num_tokens, top_k = experts.shape
    order = jnp.argsort(experts.ravel(), stable=True)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    pairs = jnp.broadcast_to(x[:, None], (num_tokens, top_k, x.shape[1]))
    rows = _permuted(pairs.reshape(-1, x.shape[1]), order, places)
    out = _swiglu(implementation, rows, gate)(rows, expert_load(experts, len(gate)), gate, up, down)
    out = _permuted(out, places, order).reshape(pairs.shape)
    return jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), out)


def capacity_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "E C"],
    tokens: Int[Array, "E C"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """The weighted sum of the experts that have a place for a token.

    out_n = sum over (e, c) with tokens_ec = n of w_ec f_e(x_n)

    All shapes are known beforehand, and all experts are one batched product: split
    over devices by experts, each device computes its own.

    Args:
      x: tokens.
      weights, tokens: from `routing.capacity_slots` or `routing.expert_choice`.
      gate, up, down: as of `dropless_experts`.

    Returns:
      An array of x's shape and dtype; zeros for a token that no expert has.

    Raises:
      ValueError: shapes disagree.

    Source: Lepikhin et al. 2020, "GShard", section 2.2 (arXiv:2006.16668).
    """
    _check_matrices("capacity_experts", x, gate, up, down)
    if weights.shape != tokens.shape or len(tokens) != len(gate):
        raise ValueError(
            f"capacity_experts: weights {weights.shape} and tokens {tokens.shape} must both be "
            f"(E, C) with E = {len(gate)} experts, as capacity_slots gives them"
        )
    seen = x[tokens]
    multiply = functools.partial(float8.product, jnp.matmul)
    hidden = swiglu(multiply(seen, gate), multiply(seen, up))
    out = multiply(hidden, down) * weights[..., None].astype(x.dtype)
    return jnp.zeros_like(x).at[tokens].add(out)


def _check_matrices(name, x, gate, up, down):
    num_experts, width, hidden = gate.shape
    if up.shape != gate.shape or down.shape != (num_experts, hidden, width):
        raise ValueError(
            f"{name}: gate {gate.shape} and up {up.shape} must be (E, D, F) and down {down.shape} "
            f"(E, F, D)"
        )
    if x.shape[1] != width:
        raise ValueError(
            f"{name}: x {x.shape} has width {x.shape[1]}, but gate {gate.shape} takes {width}"
        )


@jax.custom_vjp
def _permuted(x: Float[Array, "M D"], order: Int[Array, "M"], places: Int[Array, "M"]):
    """x[order]; that `places` undoes it makes the gradient a gather too, not a scatter."""
    return x[order]


_permuted.defvjp(
    lambda x, order, places: (x[order], places), lambda places, out: (out[places], None, None)
)


def sorted_swiglu(
    rows: Float[Array, "M D"],
    load: Int[Array, "E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "M D"]:
    """The experts on rows sorted by expert, of which the first has `load[0]`, and so on.

    Args:
      rows: sorted; those after the last expert's give anything.
      load: rows of each expert.
      gate, up, down: as of `dropless_experts`.

    Returns:
      An array of rows' shape and dtype.

    Source: as `dropless_experts`.
    """
    return _swiglu("auto", rows, gate)(rows, load, gate, up, down)


def _ragged_swiglu(rows, load, gate, up, down):
    def multiply(rows, matrices):
        return float8.product(lax.ragged_dot, rows, matrices, load)

    return multiply(swiglu(multiply(rows, gate), multiply(rows, up)), down)


def _swiglu(implementation: str, rows: Array, gate: Array) -> Callable[..., Any]:
    """The experts on rows sorted by expert, of which the first has `load[0]`, and so on."""
    known = {"ragged": _ragged_swiglu, "blocked": blocked_swiglu}
    if implementation == "auto":
        blocked = platform() == "cpu" and not float8.wanted(rows, gate)
        implementation = "blocked" if blocked else "ragged"
    if implementation not in known:
        raise ValueError(
            f'dropless_experts: implementation={implementation!r} is none of "auto", "ragged", '
            f'"blocked"'
        )
    if implementation == "blocked" and float8.wanted(rows, gate):
        raise ValueError(
            'dropless_experts: implementation="blocked" has no products of eight bits, which this '
            'trace asks for; use "ragged" or "auto"'
        )
    return known[implementation]
