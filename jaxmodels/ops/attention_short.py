"""Attention of short sequences on a CPU: so few logits that blocks would only cost.

XLA's CPU backend makes one kernel of a product, a softmax and a product, if nothing but
these stands between them: no choice among elements, and no second result such as the
log-sum-exp. So the backward pass computes the softmax from the start. It has no loop
either, in which all operands would be cut out and the results put together.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxmodels.ops.mesh_axes import vary_alike
from jaxmodels.ops.rematerialisation import ATTENTION

# Beyond as many logits of all images and heads, blocks that stay in the cache are faster.
_MOST_LOGITS = 1 << 22


def refusal(q, k, v, bias, mask, segment_ids, sinks, *, window, scale, softcap) -> str | None:
    """Why `short_attention` does not take a call, or None."""
    del v, scale
    changes = {
        "bias": bias,
        "mask": mask,
        "segment_ids": segment_ids,
        "sinks": sinks,
        "softcap": softcap,
        "window": None if window == (None, None) else window,
    }
    if given := [name for name, value in changes.items() if value is not None]:
        return f"short sequences have no kernel with {', '.join(given)}"
    logits = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    if logits > _MOST_LOGITS:
        return f"{logits} logits are more than the {_MOST_LOGITS} of short sequences"
    return None


def short_attention(
    q: Float[Array, "N T H K"],
    k: Float[Array, "N S G K"],
    v: Float[Array, "N S G V"],
    *_,
    scale: float,
    **__,
) -> Float[Array, "N T H V"]:
    """Attention in which every query sees every key, with all logits in memory.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1
    (arXiv:1706.03762); the backward pass from Dao et al. 2022, "FlashAttention",
    appendix B.4 (arXiv:2205.14135), without its blocks.
    """
    batch, length, heads, _width = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def split_heads(x):  # (N, T, H, K) to (N G, H / G T, K); products of more axes are slower
        x = x.astype(wide).transpose(0, 2, 1, 3)
        return x.reshape(batch * k.shape[2], -1, x.shape[-1])

    out = _attention(*vary_alike((split_heads(q) * scale, split_heads(k), split_heads(v))))
    out = out.reshape(batch, heads, length, -1).transpose(0, 2, 1, 3)
    return out.astype(v.dtype)


@jax.custom_vjp
def _attention(q, k, v):
    weights = _unnormalised(q, k)
    mixed = jnp.einsum("bts,bsv->btv", weights, v)
    return mixed / jnp.sum(weights, axis=-1)[..., None]


def _unnormalised(q, k):
    logits = jnp.einsum("btk,bsk->bts", q, k)
    return jnp.exp(logits - jnp.max(logits, axis=-1)[..., None])


def _forward(q, k, v):
    out = checkpoint_name(_attention(q, k, v), ATTENTION)
    return out, (q, k, v, out)


def _backward(kept, d_out):
    q, k, v, out = kept
    delta = jnp.sum(d_out * out, axis=-1)
    weights = _unnormalised(q, k)
    weights = weights / jnp.sum(weights, axis=-1)[..., None]
    d_weights = jnp.einsum("btv,bsv->bts", d_out, v)
    d_logits = weights * (d_weights - delta[..., None])
    d_q = jnp.einsum("bts,bsk->btk", d_logits, k)
    d_k = jnp.einsum("bts,btk->bsk", d_logits, q)
    return d_q, d_k, jnp.einsum("bts,btv->bsv", weights, d_out)


_attention.defvjp(_forward, _backward)
