"""Softmax attention by random features, in linear time (FAVOR+)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.feature_maps import positive_features, trigonometric_features
from jaxmodels.ops.gated_linear_attention import scalar_gated_linear_attention
from jaxmodels.ops.linear_attention import linear_attention, over_weight, with_weight
from jaxmodels.ops.running_softmax import EMPTY_LOG_SUM, document_softmax, running_softmax

_FEATURES = {"positive": positive_features, "trigonometric": trigonometric_features}


class PerformerState(NamedTuple):
    """What the tokens so far add up to; true sums are sums * exp(log_scale).

    Fields:
      sums: (*B, H, M, V + 1) of key features times values, and in the last column
        of key features. M counts sines and cosines each.
      log_scale: (*B, H), the log of the sum of the keys' factors.
    """

    sums: Float[Array, "*B H M S"]
    log_scale: Float[Array, "*B H"]


def empty_performer_state(*lead_and_heads: int, features: int, width: int) -> PerformerState:
    """The state before the first token.

    Args:
      lead_and_heads: *B and H.
      features: M; twice as many as directions for the trigonometric kernel.
      width: V, of a value.
    """
    sums = jnp.zeros((*lead_and_heads, features, width + 1))
    return PerformerState(sums, jnp.full(lead_and_heads, EMPTY_LOG_SUM))


def performer_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    projection: Float[Array, "M K"],
    *,
    kernel: str = "positive",
    causal: bool = True,
    initial_state: PerformerState | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], PerformerState | None]:
    """Approximates softmax attention with scale 1 / sqrt(K) by random features.

    out_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s (phi(q_t) . phi(k_s))
    E[phi(q) . phi(k)] = exp(q . k / sqrt(K))

    A key's features are so different in size from another's that exp overflows
    unless each is set against the sum of those before it: a running softmax over
    the keys' factors, which makes this linear attention with a decay per head that
    cancels in the quotient. (The paper's code divides by the largest feature of
    all keys, which lets earlier tokens depend on later ones.) The queries' factors
    cancel by themselves. Time and memory as `ops.linear_attention` with M for K.

    Args:
      q, k, v: queries, keys and values, not scaled.
      projection: M directions; `ops.feature_maps` draws them, and draws others for
        another key.
      kernel: "positive" or "trigonometric", see `ops.feature_maps`. The second
        may divide by a sum near zero.
      causal: hides keys that stand after the query.
      initial_state: of earlier tokens of the first document; causal only.
      segment_ids: of the documents, which do not see each other.
      form, chunk_size: as in `ops.linear_attention`.

    Returns:
      The mixed values in v's dtype, and if causal the state of the last document
      (else None).

    Raises:
      ValueError: shapes disagree, kernel or form is unknown, or an initial state
        without causal=True.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers"
    (arXiv:2009.14794), sections 2.2 to 2.4; error bounds in its section 3.
    """
    name = "performer_attention"
    if kernel not in _FEATURES:
        raise ValueError(f"{name}: kernel={kernel!r} is unknown; use one of {', '.join(_FEATURES)}")
    if q.ndim < 3 or q.shape != k.shape:
        raise ValueError(f"{name}: q {q.shape} and k {k.shape} must both be (*B, T, H, K)")
    scale = q.shape[-1] ** -0.25
    q_features, _ = _FEATURES[kernel](q * scale, projection)
    k_features, factors = _FEATURES[kernel](k * scale, projection)
    options = {"segment_ids": segment_ids, "form": form, "chunk_size": chunk_size}
    if not causal:
        if initial_state is not None:
            raise ValueError(f"{name}: initial_state contradicts causal=False; pass None")
        k_features *= document_softmax(factors[..., None], segment_ids)
        return linear_attention(q_features, k_features, v, causal=False, **options)
    *lead, _, heads, features = q_features.shape
    if initial_state is None:
        initial_state = empty_performer_state(*lead, heads, features=features, width=v.shape[-1])
    sums, log_scale = initial_state
    require_shape(name, "initial_state.log_scale", log_scale, (*lead, heads), "(*B, H)")
    weights, log_decay, log_scale = running_softmax(
        factors[..., None], log_scale[..., None], segment_ids
    )
    mixed, sums = scalar_gated_linear_attention(
        q_features,
        k_features * weights,
        with_weight(v),
        log_decay[..., 0],
        initial_state=sums,
        **options,
    )
    return over_weight(mixed).astype(v.dtype), PerformerState(sums, log_scale[..., 0])
