"""Attention block by block: memory linear in the sequence, fast on a CPU.

The forward pass takes a block of queries and all keys it may see; the backward
pass takes a block of keys and all queries that may see it, and recomputes the
probabilities from the saved log-sum-exp. Its blocks are transposed, (keys,
queries), because a product whose large operand is transposed runs at half the
speed, and this leaves one small one of the kind. A step of the outer loop works
on a few heads of an image, or on a few images, batched: every core has a head
of its own. What fits one step has no outer loop at all, which costs its share.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxmodels.ops import attention_spans as spans
from jaxmodels.ops.attention_naive import SegmentIds, Window
from jaxmodels.ops.mesh_axes import vary_alike
from jaxmodels.ops.rematerialisation import ATTENTION

# Logits of a step of the outer loop: as many as are fastest.
_FORWARD_LOGITS, _BACKWARD_LOGITS = 1 << 22, 1 << 20


class Config(NamedTuple):
    """What is fixed at trace time."""

    window: Window
    scale: float
    softcap: float | None
    offset: int  # query t stands at key t + offset


class Pairs(NamedTuple):
    """What is known of pairs of queries and keys; (N, G, H / G, T, S), each full or one."""

    bias: Array | None
    mask: Array | None
    segment_ids: SegmentIds | None


class _Block(NamedTuple):
    """Where a block lies, and its size."""

    image: Array
    images: int
    head: Array
    heads: int
    query: int | Array
    queries: int
    key: int | Array
    keys: int
    edges: tuple[tuple[int, int], ...]


def blocked_attention(
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
    """Attention whose memory grows with T + S; arguments as in `naive_attention`.

    Blocks that causality or the window hides altogether are skipped. Only a
    bias or mask given in full, and the gradient of such a bias, have T * S
    elements.

    Source: Dao et al. 2022, "FlashAttention", section 3.1 (arXiv:2205.14135).
    """
    batch, num_queries, num_heads, _ = q.shape
    num_keys, kv_heads = k.shape[1:3]
    group = num_heads // kv_heads
    config = Config(window, scale, softcap, num_keys - num_queries)

    def split_heads(x):  # (N, T, H, K) -> (N, G, H / G, T, K)
        _, length, heads, width = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch, kv_heads, heads // kv_heads, length, width)

    def split_pairs(x):
        groups = (kv_heads, group) if x.shape[1] > 1 else (1, 1)
        return x.reshape(x.shape[0], *groups, *x.shape[2:])

    pairs = Pairs(*(None if x is None else split_pairs(x) for x in (bias, mask)), segment_ids)
    # A sink is the same in all images; one copy for each is small.
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.reshape(kv_heads, group), (batch, kv_heads, group))
    arrays = (split_heads(q), split_heads(k), split_heads(v), sinks, pairs)
    out = _attention(config, *vary_alike(arrays))
    return out.reshape(batch, num_heads, num_queries, -1).transpose(0, 2, 1, 3)


def _split_steps(config, logits: int, *arrays):
    """Cuts arrays (N, G, ...) into steps (steps, images, heads, ...).

    Whole images if `logits` allows several heads a step, else some heads of one.

    Returns:
      The first image and the first head of each step, and the arrays.
    """
    q, k = arrays[:2]
    batch, kv_heads, group, num_queries = q.shape[:4]
    rows = min(spans.most_rows(config.window, num_queries), num_queries)
    columns = spans.most_columns(config.window, num_queries, k.shape[3])
    most = max(2, logits // (group * rows * columns))
    if most < kv_heads:
        images, heads = 1, _divisor(kv_heads, most)
    else:
        images, heads = _divisor(batch, most // kv_heads), kv_heads
    image, head = images * jnp.arange(batch // images), heads * jnp.arange(kv_heads // heads)
    places = jnp.repeat(image, len(head)), jnp.tile(head, len(image))

    def split(x):
        return x.reshape(-1, images, heads, *x.shape[2:])

    return *places, *jax.tree.map(split, arrays)


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if number % n == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, q, k, v, sinks, pairs):
    return forward(config, q, k, v, sinks, pairs)[0]


def forward(config, q, k, v, sinks, pairs):
    """Arrays with heads split, (N, G, H / G, T, K); the output, and what `backward` takes.

    The last of that is the log-sum-exp of every row, (N, G, H / G, T).
    """

    def one_step(operands):
        return _forward_step(config, pairs, *operands)

    steps = _split_steps(config, _FORWARD_LOGITS, q, k, v, sinks)
    out, lse = (
        checkpoint_name(x.reshape(*q.shape[:2], *x.shape[3:]), ATTENTION)
        for x in lax.map(one_step, steps)
    )
    return out, (q, k, v, sinks, pairs, out, lse)


def _forward_step(config, pairs, image, head, q, k, v, sinks):
    images, heads, group, num_queries, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, values = q.astype(wide) * config.scale, k[:, :, 0].astype(wide), v[:, :, 0].astype(wide)
    sink = None if sinks is None else sinks.astype(wide)[..., None]
    parts = []
    for span in spans.cut(
        num_queries, k.shape[2], images * heads * group, config.offset, config.window
    ):

        def one_block(i, span=span):
            query, key = span.start + i * span.rows, span.first_column(i)
            block = _Block(
                image, images, head, heads, query, span.rows, key, span.width, span.edges
            )
            rows = lax.dynamic_slice_in_dim(q, query, span.rows, axis=3)
            keys, key_values = (
                lax.dynamic_slice_in_dim(x, key, span.width, axis=2) for x in (k, values)
            )
            dots = jnp.einsum("btk,bsk->bts", _rows(rows), _rows(keys))
            dots = dots.reshape(images, heads, group, span.rows, span.width)
            logits = _finish(config, pairs, block, dots)[0]
            top = jnp.max(logits, axis=-1, initial=-jnp.inf)
            top = top if sink is None else jnp.maximum(top, sink)
            # A row without keys has the maximum -inf, and -inf - -inf is not a number.
            top = jnp.where(top == -jnp.inf, 0.0, top)
            weights = jnp.exp(logits - top[..., None])
            total = jnp.sum(weights, axis=-1)
            total = total if sink is None else total + jnp.exp(sink - top)
            total = jnp.where(total == 0.0, 1.0, total)
            mixed = jnp.einsum("bts,bsv->btv", _rows(weights), _rows(key_values))
            mixed = mixed.reshape(images, heads, group, span.rows, v.shape[-1]) / total[..., None]
            return mixed.astype(v.dtype), top + jnp.log(total)

        parts.append(jax.tree.map(_join, lax.map(one_block, jnp.arange(span.count))))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *parts)


def _rows(x):
    """(images, heads, ..., width) to (images * heads, rows, width).

    Products of three axes: those of more, some of size one, get layouts that cost a
    copy of the logits.
    """
    images, heads, *rows, width = x.shape
    return x.reshape(images * heads, math.prod(rows), width)


def _join(x):
    """(count, images, heads, group, rows, ...) to (images, heads, group, count * rows, ...)."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _finish(config, pairs, block, dots, order=(0, 1, 2, 3, 4)):
    """Soft-cap, bias and visibility on a block of dot products.

    `order` is that of (images, heads, group, queries, keys) in the block.

    Returns:
      The logits, and the derivative of the soft-cap or None.
    """
    slope = None
    if config.softcap is not None:
        bounded = jnp.tanh(dots / config.softcap)
        dots, slope = config.softcap * bounded, 1.0 - bounded * bounded
    if pairs.bias is not None:
        bias = _take(pairs.bias, block)
        dots = dots + bias.astype(dots.dtype).transpose(order)
    seen = _seen(pairs, block)
    if seen is not None:
        dots = jnp.where(seen.transpose(order), dots, -jnp.inf)
    return _window_edges(config, block, dots, order), slope


def _seen(pairs, block):
    """What mask and segments let be seen: (images, heads, group, queries, keys)."""
    seen = None
    if pairs.segment_ids is not None:
        queries, keys = pairs.segment_ids
        queries = lax.dynamic_slice(
            queries, (block.image, block.query), (block.images, block.queries)
        )
        keys = lax.dynamic_slice(keys, (block.image, block.key), (block.images, block.keys))
        seen = (queries[:, :, None] == keys[:, None, :])[:, None, None]
    if pairs.mask is not None:
        mask = _take(pairs.mask, block)
        seen = mask if seen is None else seen & mask
    return seen


def _window_edges(config, block, logits, order):
    """Hides what the window does, touching only columns that some row does not see."""
    left, right = config.window
    queries = block.query + jnp.arange(block.queries)[:, None] + config.offset
    distance = (block.key + jnp.arange(block.keys)[None, :] - queries)[None, None, None].transpose(
        order
    )
    for low, high in block.edges:
        part = distance[..., low:high]
        seen = jnp.bool_(True)
        seen = seen if left is None else seen & (part >= -left)
        seen = seen if right is None else seen & (part <= right)
        hidden = jnp.where(seen, logits[..., low:high], -jnp.inf)
        logits = logits.at[..., low:high].set(hidden)
    return logits


def _corner(x, block):
    """Where a block begins in x, which has (N, G, H / G, T, S), each full or one."""
    begin = (block.image, block.head, 0, block.query, block.key)
    return [jnp.where(size > 1, at, 0) for size, at in zip(x.shape, begin, strict=True)]


def _take(x, block):
    full = (block.images, block.heads, x.shape[2], block.queries, block.keys)
    size = [min(*pair) for pair in zip(x.shape, full, strict=True)]
    return lax.dynamic_slice(x, _corner(x, block), size)


def _add(x, block, amount):
    """Adds (images, heads, group, queries, keys) to a block of x, summed where x has one."""
    old = _take(x, block)
    axes = tuple(i for i, size in enumerate(old.shape) if size == 1)
    new = old + jnp.sum(amount, axis=axes, keepdims=True)
    return lax.dynamic_update_slice(x, new, _corner(x, block))


def backward(config, saved, d_out):
    """Gradients of what `forward` took, given those of its output.

    With the log-sum-exp and output of all keys in `saved`, some of the keys have what
    they add to the gradients: `ops.ring_attention` goes round with that.
    """
    q, k, v, sinks, pairs, out, lse = saved
    wide = lse.dtype
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
    d_bias = None if pairs.bias is None else jnp.zeros_like(pairs.bias, wide)

    def one_step(d_bias, operands):
        return _backward_step(config, pairs, d_bias, *operands)

    steps = _split_steps(config, _BACKWARD_LOGITS, q, k, v, d_out, lse, delta)
    d_bias, gradients = lax.scan(one_step, d_bias, steps)
    d_q, d_k, d_v = (x.reshape(*q.shape[:2], *x.shape[3:]) for x in gradients)
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(wide)[..., None] - lse)
        d_sinks = -jnp.sum(share * delta, axis=-1).astype(sinks.dtype)
    if d_bias is not None:
        d_bias = d_bias.astype(pairs.bias.dtype)
    return d_q, d_k, d_v, d_sinks, Pairs(d_bias, None, None)


def _backward_step(config, pairs, d_bias, image, head, q, k, v, d_out, lse, delta):
    images, heads, group, num_queries, width = q.shape
    wide, dtypes = lse.dtype, (q.dtype, k.dtype, v.dtype)
    q, k, v, d_out = (x.astype(wide) for x in (q, k[:, :, 0], v[:, :, 0], d_out))
    q = q * config.scale
    left, right = config.window
    # zeros_like, so that it varies over the axes of a shard_map as the others do.
    d_q = jnp.zeros_like(q, shape=(images, heads, width, group, num_queries))
    parts = []
    for span in spans.cut(
        k.shape[2], num_queries, images * heads * group, -config.offset, (right, left)
    ):

        def one_block(carry, i, span=span):
            d_q, d_bias = carry
            key, query = span.start + i * span.rows, span.first_column(i)
            block = _Block(
                image, images, head, heads, query, span.width, key, span.rows, span.edges
            )
            shape = (images, heads, span.rows, group, span.width)
            flat = (images * heads, span.rows, group * span.width)
            rows, row_values = (lax.dynamic_slice_in_dim(x, key, span.rows, axis=2) for x in (k, v))
            q_seen, d_out_seen, lse_seen, delta_seen = (
                lax.dynamic_slice_in_dim(x, query, span.width, axis=3)
                for x in (q, d_out, lse, delta)
            )
            rows, row_values, q_seen, d_out_seen = map(
                _rows, (rows, row_values, q_seen, d_out_seen)
            )
            dots = jnp.einsum("bsk,btk->bst", rows, q_seen).reshape(shape)
            logits, slope = _finish(config, pairs, block, dots, order=(0, 1, 4, 2, 3))
            weights = jnp.exp(logits - lse_seen[:, :, None])
            d_values = jnp.einsum("bst,btv->bsv", weights.reshape(flat), d_out_seen)
            d_weights = jnp.einsum("bsv,btv->bst", row_values, d_out_seen).reshape(shape)
            d_logits = weights * (d_weights - delta_seen[:, :, None])
            if d_bias is not None:
                d_bias = _add(d_bias, block, d_logits.transpose(0, 1, 3, 4, 2))
            if slope is not None:
                d_logits = d_logits * slope
            d_keys = jnp.einsum("bst,btk->bsk", d_logits.reshape(flat), q_seen)
            old = lax.dynamic_slice_in_dim(d_q, query, span.width, axis=4)
            new = old + jnp.einsum("bsk,bst->bkt", rows, d_logits.reshape(flat)).reshape(old.shape)
            d_q = lax.dynamic_update_slice_in_dim(d_q, new, query, axis=4)
            d_keys, d_values = (
                x.reshape(images, heads, *x.shape[1:]).astype(dtype)
                for x, dtype in ((d_keys, dtypes[1]), (d_values, dtypes[2]))
            )
            return (d_q, d_bias), (d_keys, d_values)

        (d_q, d_bias), part = lax.scan(one_block, (d_q, d_bias), jnp.arange(span.count))
        parts.append(jax.tree.map(lambda x: _join(x[:, :, :, None]), part))
    d_k, d_v = jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *parts)
    d_q = (d_q * config.scale).transpose(0, 1, 3, 4, 2).astype(dtypes[0])
    return d_bias, (d_q, d_k, d_v)


_attention.defvjp(forward, backward)
