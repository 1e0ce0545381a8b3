"""Attention of short sequences on a CPU: so few logits that blocks would only cost.

XLA's CPU backend makes one kernel of a product, a softmax and a product, if they have
neither a second result, such as the log-sum-exp, nor a choice among elements between
them. So what is hidden is said by adding minus infinity, and the backward pass computes
the softmax from the start. It has no loop either, in which all operands would be cut
out and the results put together.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxmodels.ops.attention_naive import SegmentIds, Window, visible
from jaxmodels.ops.batched_product import batched_product, transposed
from jaxmodels.ops.mesh_axes import axis_size, batch_axes, vary_alike
from jaxmodels.ops.rematerialisation import ATTENTION

# Beyond as many logits of a device's examples, blocks that stay in the cache are faster.
_MOST_LOGITS = 1 << 22


def suits(q: Float[Array, "N T H K"], k: Float[Array, "N S G K"]) -> bool:
    """Whether a call has so few logits that `short_attention` is the faster."""
    examples = q.shape[0] // axis_size(*batch_axes(len(q)))
    return examples * q.shape[2] * q.shape[1] * k.shape[1] <= _MOST_LOGITS


def short_attention(
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
    """Attention with all logits in memory; arguments as in `naive_attention`.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1
    (arXiv:1706.03762); the backward pass from Dao et al. 2022, "FlashAttention",
    appendix B.4 (arXiv:2205.14135), without its blocks.
    """
    batch, num_queries, heads, _width = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    seen = visible(num_queries, k.shape[1], mask, segment_ids, window)
    bias = None if bias is None else bias.astype(wide)
    if sinks is not None:
        k, v, bias, seen = _with_sinks(k, v, bias, seen, sinks.astype(wide))

    def split_heads(x):  # (N, T, H, K) to (N G, H / G T, K); products of more axes are slower
        x = x.astype(wide).transpose(0, 2, 1, 3)
        return x.reshape(batch * k.shape[2], -1, x.shape[-1])

    q, k, v_heads = split_heads(q) * scale, split_heads(k), split_heads(v)
    pairs = (batch, heads, num_queries, k.shape[1])
    out = _attention((pairs, softcap), *vary_alike((q, k, v_heads, bias, seen)))
    out = out.reshape(batch, heads, num_queries, -1).transpose(0, 2, 1, 3)
    return out.astype(v.dtype)


def _with_sinks(k, v, bias, seen, sinks):
    """A sink as one more key that all see: it is zero, as its value is, and its bias the sink."""
    column = sinks[None, :, None, None]
    if bias is None:
        bias = jnp.zeros((1, 1, 1, k.shape[1]), sinks.dtype)
    shape = jnp.broadcast_shapes(bias.shape, (*column.shape[:-1], k.shape[1]))
    column = jnp.broadcast_to(column, (*shape[:-1], 1))
    bias = jnp.concatenate([jnp.broadcast_to(bias, shape), column], axis=-1)
    if seen is not None:
        seen = jnp.pad(seen, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
    k, v = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (k, v))
    return k, v, bias, seen


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, q, k, v, bias, seen):
    weights, total, _ = _softmax(config, q, k, bias, seen)
    return jnp.einsum("bts,bsv->btv", weights, v) / total[..., None]


def _softmax(config, q, k, bias, seen):
    """The numerator and the sum of every row, and the derivative of the soft-cap or None."""
    pairs, softcap = config
    logits = jnp.einsum("btk,bsk->bts", q, k)
    slope = None
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, 1.0 - bounded * bounded
    if seen is not None:
        bias = jnp.where(seen, 0.0 if bias is None else bias, -jnp.inf)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias, pairs).astype(logits.dtype).reshape(logits.shape)
    # A row without keys has the maximum -inf, and -inf - -inf is not a number.
    top = jnp.maximum(jnp.max(logits, axis=-1), jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - top[..., None])
    # The sum is zero in a row without keys, and at least one in all others.
    return weights, jnp.maximum(jnp.sum(weights, axis=-1), 0.5), slope


def _forward(config, q, k, v, bias, seen):
    out = checkpoint_name(_attention(config, q, k, v, bias, seen), ATTENTION)
    return out, (q, k, v, bias, seen, out)


def _backward(config, kept, d_out):
    q, k, v, bias, seen, out = kept
    delta = jnp.sum(d_out * out, axis=-1)
    weights, total, slope = _softmax(config, q, k, bias, seen)
    # They are those of the forward pass, of which XLA would make all below at once otherwise.
    weights, d_out = jax.lax.optimization_barrier((weights, d_out))
    weights = weights / total[..., None]
    d_weights = batched_product(d_out, v.swapaxes(1, 2))
    d_logits = weights * (d_weights - delta[..., None])
    d_bias = None if bias is None else _sum_to(bias.shape, d_logits.reshape(config[0]))
    if slope is not None:
        d_logits = d_logits * slope
    d_q = batched_product(d_logits, k)
    d_k = batched_product(transposed(d_logits), q)
    return d_q, d_k, batched_product(transposed(weights), d_out), d_bias, None


def _sum_to(shape, x):
    """Sums x over the axes in which the shape has one."""
    if shape[0] < x.shape[0]:
        # A product: XLA's sum over the first axis takes as long as the whole rest.
        x = (jnp.ones((1, x.shape[0]), x.dtype) @ x.reshape(x.shape[0], -1)).reshape(
            1, *x.shape[1:]
        )
    one = tuple(i for i, size in enumerate(shape) if size < x.shape[i])
    return jnp.sum(x, axis=one, keepdims=True)


_attention.defvjp(_forward, _backward)
