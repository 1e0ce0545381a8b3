"""Attention by its definition: every logit at once.

The reference that the faster paths are tested against, and the path for any
platform and combination of options that has no faster one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Window = tuple[int | None, int | None]
SegmentIds = tuple[Int[Array, "N T"], Int[Array, "N S"]]


def visible(
    num_queries: int,
    num_keys: int,
    mask: Bool[Array, "#N #H #T #S"] | None,
    segment_ids: SegmentIds | None,
    window: Window,
) -> Bool[Array, "#N #H T S"] | None:
    """Which key each query sees, all restrictions together; None when all see all.

    Queries are aligned with the last keys: query t stands at t + S - T.

    Source: the definition of each restriction, see `ops.dot_product_attention`.
    """
    left, right = window
    distance = jnp.arange(num_keys)[None, :] - (
        jnp.arange(num_queries)[:, None] + num_keys - num_queries
    )
    parts = []
    if left is not None:
        parts.append((distance >= -left)[None, None])
    if right is not None:
        parts.append((distance <= right)[None, None])
    if segment_ids is not None:
        queries, keys = segment_ids
        parts.append((queries[:, :, None] == keys[:, None, :])[:, None])
    if mask is not None:
        parts.append(mask)
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    shape = (*jnp.broadcast_shapes(seen.shape[:2]), num_queries, num_keys)
    return jnp.broadcast_to(seen, shape)


def naive_attention(
    q: Float[Array, "N T H K"],
    k: Float[Array, "N S G K"],
    v: Float[Array, "N S G V"],
    bias: Float[Array, "#N #H #T #S"] | None,
    mask: Bool[Array, "#N #H #T #S"] | None,
    segment_ids: SegmentIds | None,
    sinks: Float[Array, "H"] | None,
    *,
    window: Window,
    scale: float,
    softcap: float | None,
) -> Float[Array, "N T H V"]:
    """Attention with all N * H * T * S logits in memory, in float32 or wider.

    The equation is that of `jaxmodels.ops.dot_product_attention`, which checks
    the arguments and gives them this form.

    Args:
      q, k, v: queries, keys and values.
      bias, mask: of four dimensions, each full or one.
      segment_ids: of the queries and of the keys.
      sinks: an extra logit a head.
      window: how many keys to the left and to the right a query sees.
      scale: factor on q . k.
      softcap: bound on the logits before the bias.

    Returns:
      The mixed values, in v's dtype.
    """
    batch, num_queries, heads, _ = q.shape
    num_keys, kv_heads = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    groups = (kv_heads, heads // kv_heads)
    grouped_q = q.reshape(batch, num_queries, *groups, -1)
    logits = jnp.einsum("ntgrk,nsgk->ngrts", grouped_q, k, preferred_element_type=wide)
    logits = logits.reshape(batch, heads, num_queries, num_keys) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.astype(wide)
    seen = visible(num_queries, num_keys, mask, segment_ids, window)
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    weights = _softmax(logits, None if sinks is None else sinks.astype(wide))
    weights = weights.reshape(batch, *groups, num_queries, num_keys).astype(v.dtype)
    out = jnp.einsum("ngrts,nsgv->ntgrv", weights, v, preferred_element_type=wide)
    return out.reshape(batch, num_queries, heads, -1).astype(v.dtype)


def _softmax(logits: Float[Array, "N H T S"], sinks: Float[Array, "H"] | None) -> Array:
    """Softmax over keys; zeros where no key is seen, less than one with a sink."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks[None, :, None, None]
    if sink is not None:
        top = jnp.maximum(top, sink)
    # A row without keys has the maximum -inf, and -inf - -inf is not a number.
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    return weights / jnp.where(total == 0.0, 1.0, total)
