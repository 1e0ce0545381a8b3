"""A softmax over time: over the tokens so far, or over those of a document.

Over the tokens so far it is a recurrence. When a token joins, the weights of all
earlier ones shrink by one factor, so that a sum of values under a running softmax
is gated linear attention, whose exponents are never positive: it overflows
nowhere, and no token depends on a later one, not even by rounding.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.segments import document_starts

# log of a sum of nothing; finite, so that differences are never nan.
EMPTY_LOG_SUM = float(jnp.finfo(jnp.float32).min)


def running_softmax(
    logits: Float[Array, "*B T H M"],
    log_sum: Float[Array, "*B H M"],
    segment_ids: Int[Array, "*B T"] | None = None,
) -> tuple[Float[Array, "*B T H M"], Float[Array, "*B T H M"], Float[Array, "*B H M"]]:
    """Softmax over each document's tokens so far, as what a gated recurrence takes.

    weight_t = exp(l_t - L_t),   decay_t = exp(L_(t-1) - L_t),   L_t = log sum_(s<=t) exp(l_s)

    Token s weighs weight_s decay_(s+1) ... decay_t = exp(l_s - L_t) at time t.
    Computed by a parallel scan, in time O(T) and log T steps.

    Args:
      logits: in float32.
      log_sum: L before the first token, of its document; `EMPTY_LOG_SUM` if none.
      segment_ids: of the documents.

    Returns:
      The weights and the log decays (0 where nothing is there to decay), and the
      log sum of the last document.

    Source: the online softmax of Milakov and Gimelshein 2018 (arXiv:1805.02867).
    """
    # The first token takes the past in, and the rest follows.
    axis = logits.ndim - 3
    first = jnp.logaddexp(log_sum[..., None, :, :], logits[..., :1, :, :])
    joined = jnp.concatenate([first, logits[..., 1:, :, :]], axis)
    sums = _cumulative_log_sum(joined, segment_ids)
    before = jnp.concatenate([log_sum[..., None, :, :], sums[..., :-1, :, :]], axis)
    fresh = before == EMPTY_LOG_SUM
    if segment_ids is not None:
        starts = document_starts(segment_ids).at[..., 0].set(False)
        fresh |= starts[..., None, None]
    log_decay = jnp.where(fresh, 0.0, jnp.minimum(before - sums, 0.0))
    return jnp.exp(logits - sums), log_decay, sums[..., -1, :, :]


def document_softmax(
    logits: Float[Array, "*B T H M"], segment_ids: Int[Array, "*B T"] | None = None
) -> Float[Array, "*B T H M"]:
    """Softmax over all tokens of each document.

    weight_t = exp(l_t) / sum_s exp(l_s),   s in the document of t

    Args:
      logits: in float32.
      segment_ids: of the documents; None is one.

    Source: the definition.
    """
    if segment_ids is None:
        return jax.nn.softmax(logits, axis=-3)
    sums = _cumulative_log_sum(logits, segment_ids)
    places = jnp.arange(segment_ids.shape[-1], dtype=jnp.int32)
    starts = document_starts(segment_ids)
    # The sum at a document's last token is the whole sum.
    is_last = jnp.concatenate([starts[..., 1:], jnp.ones_like(starts[..., :1])], axis=-1)
    last = lax.cummin(jnp.where(is_last, places, places[-1]), starts.ndim - 1, reverse=True)
    return jnp.exp(logits - jnp.take_along_axis(sums, last[..., None, None], axis=-3))


def _cumulative_log_sum(logits: Array, segment_ids: Array | None) -> Array:
    """log of the sum of exp over each document's tokens so far."""
    axis = logits.ndim - 3
    if segment_ids is None:
        # Not lax.cumlogsumexp, which is a hundred times slower on a CPU.
        return lax.associative_scan(jnp.logaddexp, logits, axis=axis)
    starts = document_starts(segment_ids)[..., None, None]

    def join(left, right):
        (left_start, earlier), (right_start, later) = left, right
        joined = jnp.where(right_start, later, jnp.logaddexp(earlier, later))
        return left_start | right_start, joined

    return lax.associative_scan(join, (starts, logits), axis=axis)[1]
