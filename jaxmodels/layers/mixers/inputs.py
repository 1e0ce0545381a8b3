"""What every mixer checks of a call, and how positions are counted."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmodels.layers.mixers.cache import KVCache
from jaxmodels.ops.segments import document_positions, document_starts


def check_call(name: str, x: Array, positions: Array | None, segment_ids: Array | None) -> None:
    """Raises unless the arguments of a mixer call fit each other.

    Raises:
      ValueError: naming the mixer, the argument, the shapes and the remedy.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{name}: x {x.shape} must be (B, T, D) with nothing empty")
    for argument, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: {argument} {value.shape} must be (B, T) = {x.shape[:2]}, an integer "
                f"a token of x {x.shape}"
            )


def check_state(name: str, state: object, expected: object) -> None:
    """Raises unless `state` has the structure and shapes of `expected`.

    Args:
      name: of the mixer, for the error.
      state: what the caller passed.
      expected: `init_state(batch of x, ...)`, or its `jax.eval_shape`.

    Raises:
      ValueError: naming the mixer, both shapes and the remedy.
    """
    # Which tokens of this call see each other is set by the caller, not by init_state.
    if isinstance(state, KVCache):
        state = state._replace(among=None)
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise ValueError(
            f"{name}: state is a {type(state).__name__} of {jax.tree.structure(state)}, not "
            f"{jax.tree.structure(expected)}; pass what this mixer's init_state gives"
        )
    found, wanted = ([x.shape for x in jax.tree.leaves(tree)] for tree in (state, expected))
    if found != wanted:
        raise ValueError(
            f"{name}: state has shapes {found} and this call needs {wanted}; it was made for "
            f"another batch, length or mixer. Pass init_state of x's batch"
        )


def require_causal(name: str, causal: bool, reason: str) -> None:
    """Raises if a mixer without a bidirectional form is asked for one.

    Raises:
      ValueError: naming the mixer and what to take instead.
    """
    if not causal:
        raise ValueError(
            f"{name}: causal=False is not defined, {reason}; for bidirectional mixing use one "
            f'of "softmax", "sliding_window", "sparse", "linear", "efficient", "performer", '
            f'"linformer", "gau", "flash_quad", "flash"'
        )


def require_no_state_if_bidirectional(name: str, causal: bool, state: object) -> None:
    """Raises if tokens that see the future are to be streamed.

    Raises:
      ValueError: naming the mixer and the remedy.
    """
    if state is not None and not causal:
        raise ValueError(
            f"{name}: a state continues a sequence from left to right, which causal=False "
            f"contradicts; pass state=None or use causal=True"
        )


def token_positions(
    x: Array,
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    seen: Int[Array, "B"] | None = None,
) -> Int[Array, "B T"]:
    """The positions given, or counted from the start of each document.

    Args:
      x: (B, T, D), for its shape.
      positions: returned as they are.
      segment_ids: of the documents.
      seen: how many tokens of the first document a state has already seen.
    """
    if positions is not None:
        return positions
    batch, length, _ = x.shape
    if segment_ids is None:
        counted = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return counted if seen is None else counted + seen[:, None]
    counted = document_positions(segment_ids)
    if seen is None:
        return counted
    borders = jnp.cumsum(document_starts(segment_ids), axis=-1)
    return counted + jnp.where(borders == 1, seen[:, None], 0)
