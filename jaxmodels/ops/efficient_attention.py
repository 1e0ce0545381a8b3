"""Attention with two softmaxes, one over features and one over time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.gated_linear_attention import gated_linear_attention
from jaxmodels.ops.linear_attention import linear_attention
from jaxmodels.ops.running_softmax import EMPTY_LOG_SUM, document_softmax, running_softmax


class EfficientState(NamedTuple):
    """What the tokens so far add up to.

    Fields:
      means: (*B, H, K, V), for each key feature the mean value under its softmax.
      log_sum: (*B, H, K), the log of the softmax's denominator.
    """

    means: Float[Array, "*B H K V"]
    log_sum: Float[Array, "*B H K"]


def empty_efficient_state(*lead_and_heads: int, key_width: int, width: int) -> EfficientState:
    """The state before the first token.

    Args:
      lead_and_heads: *B and H.
      key_width, width: K of a key, V of a value.
    """
    return EfficientState(
        jnp.zeros((*lead_and_heads, key_width, width)),
        jnp.full((*lead_and_heads, key_width), EMPTY_LOG_SUM),
    )


def efficient_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    *,
    causal: bool = True,
    initial_state: EfficientState | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], EfficientState | None]:
    """Mixes values first over time by the keys, then over features by the queries.

    out_t = sum_c softmax_c(q_t)_c  sum_s softmax_s(k_c)_s v_s

    A key feature is an attention map over the sequence that is the same for all
    queries; a query chooses among the K means. The weights of a query sum to one.
    Causally, the softmax over time runs over the tokens so far, so it is gated
    linear attention with a decay per feature (see `ops.running_softmax`); this
    form is not in the paper, which is bidirectional. Time and memory as
    `ops.linear_attention`.

    Args:
      q, k, v: queries, keys and values; no scale is applied.
      causal: hides keys that stand after the query.
      initial_state: of earlier tokens of the first document; causal only.
      segment_ids: of the documents, which do not see each other.
      form, chunk_size: as in `ops.linear_attention`.

    Returns:
      The mixed values in v's dtype, and if causal the state of the last document
      (else None).

    Raises:
      ValueError: shapes disagree, the form is unknown, or an initial state
        without causal=True.

    Source: Shen et al. 2018, "Efficient Attention: Attention with Linear
    Complexities", section 3.2 (arXiv:1812.01243).
    """
    name = "efficient_attention"
    if q.ndim < 3 or q.shape != k.shape:
        raise ValueError(f"{name}: q {q.shape} and k {k.shape} must both be (*B, T, H, K)")
    options = {"segment_ids": segment_ids, "form": form, "chunk_size": chunk_size}
    q = jax.nn.softmax(q.astype(jnp.float32), axis=-1)
    k = k.astype(jnp.float32)
    if not causal:
        if initial_state is not None:
            raise ValueError(f"{name}: initial_state contradicts causal=False; pass None")
        weights = document_softmax(k, segment_ids)
        return linear_attention(q, weights, v, causal=False, normalise=False, **options)
    *lead, _, heads, width = q.shape
    if initial_state is None:
        initial_state = empty_efficient_state(*lead, heads, key_width=width, width=v.shape[-1])
    means, log_sum = initial_state
    require_shape(name, "initial_state.log_sum", log_sum, (*lead, heads, width), "(*B, H, K)")
    weights, log_decay, log_sum = running_softmax(k, log_sum, segment_ids)
    out, means = gated_linear_attention(q, weights, v, log_decay, initial_state=means, **options)
    return out, EfficientState(means, log_sum)
