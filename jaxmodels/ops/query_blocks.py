"""Softmax attention with logits of any kind, a block of queries at a time.

For logits that are no single product of q and k plus an array that could be
kept: biases computed from distances, or products chosen by distance.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

# Far below any logit, yet finite: its gradient is zero, that of -inf would be NaN.
_HIDDEN = -1e30


def attend_in_blocks(
    logits: Callable[[PyTree], Float[Array, "B H R S"]],
    rows: PyTree[Array],
    v: Float[Array, "B S G V"],
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    mask: Bool[Array, "..."] | None = None,
    segment_ids: Int[Array, "..."] | tuple[Int[Array, "..."], Int[Array, "..."]] | None = None,
    sinks: Float[Array, "H"] | None = None,
    block_size: int = 256,
) -> Float[Array, "B T H V"]:
    """Mixes values by the softmax of `logits`, computed for block_size queries at once.

    out_t = sum_s softmax_s(logits(rows)_ts) v_s,   s visible to t

    A block's logits are thrown away and computed anew for gradients, so memory is
    O(H S block_size), not O(H T S). Time is O(H T S): what causality or a window
    hide is computed, too.

    Args:
      logits: from the rows of R queries to their logits with all keys. It may use
        keys and parameters from outside; gradients reach them.
      rows: what belongs to the queries; arrays (B, T, ...) or (1, T, ...).
      v: values; G divides H.
      causal, window, mask, segment_ids, sinks: as in `ops.dot_product_attention`.
      block_size: queries at once; need not divide T.

    Returns:
      The mixed values, in v's dtype.

    Raises:
      ValueError: block_size is less than 1, causal and window contradict each other,
        or mask or segment_ids have another shape.

    Source: none; the definition of softmax attention.
    """
    num_queries, num_keys = jax.tree.leaves(rows)[0].shape[1], v.shape[1]
    if block_size < 1:
        raise ValueError(f"attend_in_blocks: block_size={block_size} must be at least 1")
    reach = _reach(causal, window)
    queries, keys = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    _check_ids(queries, keys, len(v), num_queries, num_keys)
    # What belongs to the queries, with them along axis 1.
    places = jnp.arange(num_keys - num_queries, num_keys)[None]
    operands = (rows, places, queries, _by_query(mask, num_queries, num_keys))

    @jax.checkpoint
    def block(operands):
        rows, places, queries, mask = operands
        distance = places[:, :, None] - jnp.arange(num_keys)[None, None, :]
        seen = _within(distance, *reach)
        if queries is not None:
            seen = seen & (queries[:, :, None] == keys[:, None, :])
        seen = seen[:, None] if mask is None else seen[:, None] & mask.swapaxes(1, 2)
        return _mix(logits(rows), seen, sinks, v)

    size = min(block_size, num_queries)
    if size == num_queries:
        return block(operands)
    count = -(-num_queries // size)
    parts = lax.map(block, jax.tree.map(lambda x: _split(x, count, size), operands))
    out = jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], count * size, *parts.shape[3:])
    return out[:, :num_queries]


def dot_products(
    q: Float[Array, "B R H K"],
    k: Float[Array, "B S G K"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H R S"]:
    """Logits cap(scale q . k) in float32 or wider, as `ops.dot_product_attention` has them.

    Args:
      q, k: queries and keys; G divides H.
      scale: factor on q . k; None is 1 / sqrt(K).
      softcap: bounds the logits smoothly between -softcap and softcap.

    Source: `ops.dot_product_attention`.
    """
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, width)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    dots = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=wide)
    dots = dots.reshape(batch, heads, length, -1)
    dots = dots * (1.0 / math.sqrt(width) if scale is None else scale)
    return dots if softcap is None else softcap * jnp.tanh(dots / softcap)


def _reach(causal: bool, window) -> tuple[int | None, int | None]:
    left, right = window if isinstance(window, tuple) else (window, None if causal else window)
    if causal and right:
        raise ValueError(
            f"attend_in_blocks: window={window} looks to the right, which causal=True forbids; "
            f"use ({left}, 0)"
        )
    return left, 0 if causal else right


def _check_ids(queries, keys, batch: int, num_queries: int, num_keys: int) -> None:
    expected = ((batch, num_queries), (batch, num_keys))
    if queries is not None and (queries.shape, keys.shape) != expected:
        raise ValueError(
            f"attend_in_blocks: segment_ids {queries.shape} of queries and {keys.shape} of keys "
            f"must have shapes {expected[0]} and {expected[1]}"
        )


def _by_query(mask: Array | None, num_queries: int, num_keys: int) -> Array | None:
    """A mask broadcastable to (B, H, T, S) as (#B, T, #H, #S)."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[2] not in (1, num_queries) or mask.shape[3] not in (1, num_keys):
        raise ValueError(
            f"attend_in_blocks: mask {mask.shape} must be broadcastable to (B, H, T, S) with "
            f"T={num_queries} and S={num_keys}"
        )
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], num_queries, mask.shape[3]))
    return mask.swapaxes(1, 2)


def _within(distance: Array, left: int | None, right: int | None) -> Array:
    seen = jnp.ones_like(distance, bool)
    seen = seen if left is None else seen & (distance <= left)
    return seen if right is None else seen & (distance >= -right)


def _split(x: Array, count: int, size: int) -> Array:
    """(B, T, ...) to (count, B, size, ...), with zeros at the end, which see nothing."""
    pad = [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _mix(scores, seen, sinks, v):
    scores = jnp.where(seen, scores, _HIDDEN)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(scores.dtype)[:, None], scores.shape[1:3])
        sink = jnp.broadcast_to(sink[None, :, :, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : seen.shape[-1]]
    # A query that sees no key mixes nothing.
    weights = jnp.where(seen, weights, 0.0).astype(v.dtype)
    batch, heads, length, _ = weights.shape
    weights = weights.reshape(batch, v.shape[2], -1, *weights.shape[2:])
    out = jnp.einsum("bgrts,bsgv->btgrv", weights, v, preferred_element_type=scores.dtype)
    return out.reshape(batch, length, heads, -1).astype(v.dtype)
