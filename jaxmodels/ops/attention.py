"""Scaled dot-product attention with everything that models have added to it."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops import attention_short
from jaxmodels.ops.attention_blocked import blocked_attention
from jaxmodels.ops.attention_fused import KERNELS
from jaxmodels.ops.attention_mesh import attend_on_mesh
from jaxmodels.ops.attention_naive import naive_attention
from jaxmodels.ops.platform import platform


def dot_product_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B S G K"],
    v: Float[Array, "*B S G V"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    segment_ids: Int[Array, "..."] | tuple[Int[Array, "..."], Int[Array, "..."]] | None = None,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    implementation: Literal["auto", "naive", "blocked", "short", "fused"] = "auto",
) -> Float[Array, "*B T H V"]:
    """Mixes values by how well each query matches their keys.

    l_ts = cap(scale q_t . k_s) + bias_ts,   cap(x) = softcap tanh(x / softcap)
    out_t = sum_s exp(l_ts) v_s / (sum_s exp(l_ts) + exp(sink)),   s visible to t

    A key is visible if every one of mask, segment_ids, causal and window lets
    it be. Queries are aligned with the last keys: query t stands at t + S - T,
    so the last query of a causal call sees all keys. A query that sees no key
    returns zeros. The softmax is computed in float32 or wider.

    Time is O(T S); memory is O(T + S) for "blocked" and "fused" and O(T S) for
    "naive" and "short". Key and value heads are shared by H / G query heads each, without
    being copied. Traced for a mesh (`ops.mesh_axes`), "auto" leaves examples and heads
    on their devices, and goes round a ring where the sequence is split.

    Args:
      q, k, v: queries, keys and values; G divides H.
      bias: added to the logits after the soft-cap; broadcastable to (*B, H, T, S).
      mask: True where a query may see a key; broadcastable to (*B, H, T, S).
      segment_ids: (*B, T), or a pair (*B, T) and (*B, S) if queries and keys
        differ; only equal ids see each other.
      causal: hides keys that stand after the query.
      window: (left, right), how many keys to each side of its own place a query
        sees; an int is both, or the left alone if causal. What others call a
        sliding window of W, with the query itself, is window=W - 1 here.
      scale: factor on q . k; None is 1 / sqrt(K), and T5 takes 1.
      softcap: bounds q . k smoothly between -softcap and softcap (Gemma 2).
      sinks: a logit a head that takes part in the softmax without a value
        (attention sinks as in gpt-oss).
      implementation: "naive" has all logits in memory; "blocked" is for CPU and
        for long sequences anywhere; "short" for few logits on CPU; "fused" is the
        kernel of the platform (cuDNN on CUDA, splash attention on TPU); "auto" is, on
        CPU, short up to 4 million logits in all and else blocked, on others fused
        where the kernel supports the call, else naive.

    Returns:
      The mixed values, in v's dtype.

    Raises:
      ValueError: shapes disagree, options contradict each other, or the
        platform has no fused kernel for these options.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2
    (arXiv:1706.03762); grouped heads from Ainslie et al. 2023
    (arXiv:2305.13245); soft-cap from Gemma 2 (arXiv:2408.00118); the blocked
    form from Dao 2023, "FlashAttention-2" (arXiv:2307.08691).
    """
    _check_shapes(q, k, v)
    lead, (num_queries, heads, width) = q.shape[:-3], q.shape[-3:]
    pairs = (*lead, heads, num_queries, k.shape[-3])
    if sinks is not None and sinks.shape != (heads,):
        _fail(f"sinks must have shape ({heads},), one a query head, not {sinks.shape}")
    if softcap is not None and softcap <= 0:
        _fail(f"softcap={softcap} must be positive; None turns it off")
    options = {
        "window": _window(causal, window),
        "scale": 1.0 / math.sqrt(width) if scale is None else scale,
        "softcap": softcap,
    }
    arguments = (
        *(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)),
        _flat_pairs("bias", bias, pairs),
        _flat_pairs("mask", mask, pairs),
        _flat_ids(segment_ids, (*lead, num_queries), (*lead, k.shape[-3])),
        sinks,
    )
    attend = _choose(implementation, _platform(), arguments, options)
    if implementation == "auto":
        attend = partial(attend_on_mesh, attend)
    out = attend(*arguments, **options)
    return out.reshape(*lead, *out.shape[1:])


def _fail(message: str):
    raise ValueError(f"dot_product_attention: {message}")


def _check_shapes(q, k, v):
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim < 3 or not q.ndim == k.ndim == v.ndim:
        _fail(f"q, k and v must be (*B, T, H, K) with the same leading dimensions, not {shapes}")
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        _fail(f"leading dimensions differ: {shapes}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        _fail(f"k and v must agree in length and heads, q and k in width: {shapes}")
    if 0 in q.shape + k.shape + v.shape:
        _fail(f"an empty dimension has nothing to attend: {shapes}")
    if q.shape[-2] % k.shape[-2]:
        _fail(
            f"{q.shape[-2]} query heads are no multiple of {k.shape[-2]} key/value heads; "
            f"choose a number of key/value heads that divides the query heads"
        )


def _window(causal: bool, window) -> tuple[int | None, int | None]:
    """Causality and the window as one: keys visible to the left and to the right."""
    if window is None:
        return None, 0 if causal else None
    left, right = (window, 0 if causal else window) if isinstance(window, int) else window
    if left < 0 or right < 0:
        _fail(f"window={window} must not be negative; (0, 0) is the query's own place")
    if causal and right > 0:
        _fail(f"window={window} looks to the right, which causal=True forbids; use ({left}, 0)")
    return left, right


def _flat_pairs(name: str, x, pairs: tuple[int, ...]):
    """Gives a bias or mask one batch dimension and four in all, each full or one."""
    if x is None:
        return None
    shape = (1,) * (len(pairs) - x.ndim) + x.shape
    if len(shape) != len(pairs) or any(a not in (1, b) for a, b in zip(shape, pairs, strict=True)):
        _fail(f"{name} {x.shape} must be broadcastable to (*B, H, T, S) = {pairs}")
    x = x.reshape(shape)
    if any(n > 1 for n in shape[:-3]):
        x = jnp.broadcast_to(x, pairs[:-3] + shape[-3:])
    return x.reshape(math.prod(x.shape[:-3]), *shape[-3:])


def _flat_ids(segment_ids, queries: tuple[int, ...], keys: tuple[int, ...]):
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    shapes = tuple(x.shape for x in pair)
    if shapes != (queries, keys):
        _fail(f"segment_ids {shapes} must have shapes {queries} for queries and {keys} for keys")
    flat = tuple(x.reshape(-1, x.shape[-1]) for x in pair)
    return flat if isinstance(segment_ids, tuple) else (flat[0], flat[0])


def _platform() -> str:
    """As `ops.platform.platform`, with the two kinds of GPU told apart."""
    name = platform()
    if name != "gpu":
        return name
    return "cuda" if "cuda" in jax.devices()[0].client.platform_version else "rocm"


def _choose(implementation: str, where: str, arguments, options):
    if implementation == "naive":
        return naive_attention
    if implementation == "auto" and where == "cpu":
        implementation = "short" if attention_short.suits(*arguments[:2]) else "blocked"
    if implementation == "short":
        return attention_short.short_attention
    if implementation == "blocked":
        return blocked_attention
    if implementation not in ("auto", "fused"):
        known = '"auto", "naive", "blocked", "short", "fused"'
        _fail(f"implementation={implementation!r} is none of {known}")
    kernel = KERNELS.get(where)
    if kernel is None:
        refusal = f"{where} has no fused kernel"
    else:
        refusal = kernel.refusal(*arguments, **options)
    if refusal is None:
        return kernel.attend
    if implementation == "fused":
        _fail(f'implementation="fused": {refusal}; use "auto", "blocked" or "naive"')
    return naive_attention
