"""Attention by the accelerator's own kernel: cuDNN on GPU, splash attention on TPU.

Each has a function that says why a call is not supported, or None.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.ops.attention_naive import visible

# Blocks of the TPU kernel are whole vector registers long.
_TPU_BLOCK = 128


class Kernel(NamedTuple):
    """A fused kernel: `refusal(arguments, options)` is None where `attend` works."""

    refusal: Callable[..., str | None]
    attend: Callable[..., Array]


def _cudnn_refusal(q, k, v, bias, mask, segment_ids, sinks, *, window, scale, softcap):
    del scale, window
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return f"cuDNN takes bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if sinks is not None or softcap is not None:
        return "cuDNN has neither sinks nor softcap"
    width = q.shape[-1]
    if width != v.shape[-1] or width % 8 or width > 128:
        return f"cuDNN needs K = V, a multiple of 8 up to 128, not K={width}, V={v.shape[-1]}"
    odd = q.shape[1] % 2 or k.shape[1] % 2
    pairs = [x is not None for x in (bias, mask, segment_ids)]
    if odd and (any(pairs) or q.shape[1] != k.shape[1]):
        return f"cuDNN needs even lengths with a bias or mask, not {q.shape[1]} and {k.shape[1]}"
    if _cuda_capability() < 8.0:
        return "cuDNN's flash attention needs a GPU of compute capability 8.0 or more"
    return None


def _cuda_capability() -> float:
    return float(getattr(jax.devices()[0], "compute_capability", "0"))


def _cudnn_attention(
    q: Float[Array, "N T H K"],
    k: Float[Array, "N S G K"],
    v: Float[Array, "N S G K"],
    bias,
    mask,
    segment_ids,
    sinks,
    *,
    window,
    scale,
    softcap,
) -> Float[Array, "N T H K"]:
    del sinks, softcap  # refused
    left, right = window
    # cuDNN aligns queries with the first keys, its window is causal, and it
    # spreads a row without keys over all of them: such cases become a mask,
    # which tells the rows without keys.
    plain = mask is None and segment_ids is None and q.shape[1] == k.shape[1]
    own_window = plain and right == 0
    seen = visible(
        q.shape[1], k.shape[1], mask, segment_ids, (None, None) if own_window else window
    )
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], q.shape[1], k.shape[1])).astype(q.dtype)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        seen,
        scale=scale,
        is_causal=own_window,
        local_window_size=(left, 0) if own_window and left is not None else None,
        implementation="cudnn",
    )
    if seen is None:
        return out
    return jnp.where(jnp.any(seen, axis=-1).swapaxes(1, 2)[..., None], out, 0)


def _splash_refusal(q, k, v, bias, mask, segment_ids, sinks, *, window, scale, softcap):
    del scale, sinks, softcap
    num_queries, num_keys = q.shape[1], k.shape[1]
    if bias is not None or mask is not None:
        return "the TPU kernel takes no bias and no mask; segment_ids, causal and window it has"
    if num_queries % _TPU_BLOCK or num_keys % _TPU_BLOCK:
        return f"the TPU kernel needs T and S to be multiples of {_TPU_BLOCK}"
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        return "the TPU kernel divides by zero where segment_ids leave a query without keys"
    if window != (None, None) and num_queries != num_keys:
        return "the TPU kernel divides by zero where the window leaves a query without keys"
    return None


def _splash_attention(
    q: Float[Array, "N T H K"],
    k: Float[Array, "N S G K"],
    v: Float[Array, "N S G V"],
    bias,
    mask,
    segment_ids,
    sinks,
    *,
    window,
    scale,
    softcap,
    interpret: bool = False,
) -> Float[Array, "N T H V"]:
    # Imported here because it takes a third of a second that only a TPU needs.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    del bias, mask  # refused
    shape = (q.shape[1], k.shape[1])
    if window == (None, None):
        pattern = splash.FullMask(shape)
    else:
        pattern = splash.LocalMask(shape, window, offset=0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([pattern] * q.shape[2]),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def one_image(q, k, v, ids):
        return kernel(q, k, v, None if ids is None else splash.SegmentIds(*ids), sinks)

    heads_first = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    return jax.vmap(one_image)(*heads_first, segment_ids).swapaxes(1, 2).astype(v.dtype)


KERNELS = {
    "cuda": Kernel(_cudnn_refusal, _cudnn_attention),
    "tpu": Kernel(_splash_refusal, _splash_attention),
}
