"""A softmax over time: over the tokens so far, or over those of a document.

Over the tokens so far it is a recurrence. When a token joins, the weights of all
earlier ones shrink by one factor, so that a sum of values under a running softmax
is gated linear attention, whose exponents are never positive: it overflows
nowhere, and no token depends on a later one, not even by rounding.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.segments import document_starts

# log of a sum of nothing; finite, so that differences are never nan.
EMPTY_LOG_SUM = float(jnp.finfo(jnp.float32).min)
# Tokens that are taken one after the other.
_CHUNK_SIZE = 128


def running_softmax(
    logits: Float[Array, "*B T H M"],
    log_sum: Float[Array, "*B H M"],
    segment_ids: Int[Array, "*B T"] | None = None,
) -> tuple[Float[Array, "*B T H M"], Float[Array, "*B T H M"], Float[Array, "*B H M"]]:
    """Softmax over each document's tokens so far, as what a gated recurrence takes.

    weight_t = exp(l_t - L_t),   decay_t = exp(L_(t-1) - L_t),   L_t = log sum_(s<=t) exp(l_s)

    Token s weighs weight_s decay_(s+1) ... decay_t = exp(l_s - L_t) at time t.
    In time O(T). No forward-mode derivative.

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
        starts = jnp.zeros((logits.shape[axis],) + (1,) * (logits.ndim - 1), bool)
    else:
        starts = jnp.moveaxis(document_starts(segment_ids)[..., None, None], axis, 0)
    return jnp.moveaxis(_log_sums(jnp.moveaxis(logits, axis, 0), starts), 0, axis)


# In chunks, one token of all of them after the other, and then from chunk to chunk: a scan
# of T tokens by halves goes through memory three times as often, and lax.cumlogsumexp is a
# hundred times slower on a CPU.
@jax.custom_vjp
def _log_sums(logits: Float[Array, "T *B"], starts: Bool[Array, "T *#B"]) -> Float[Array, "T *B"]:
    """log of the sum of exp of what has come since the last start."""

    def join(earlier, later):
        (earlier_sum, earlier_hides), (later_sum, later_hides) = earlier, later
        joined = jnp.logaddexp(earlier_sum + later_hides, later_sum)
        return joined, jnp.minimum(earlier_hides, later_hides)

    def add(carry, token):
        carry = join(carry, token)
        return carry, carry

    # Added to the sum of what was before a start, it leaves nothing of that.
    hides = jnp.where(starts, EMPTY_LOG_SUM, 0.0)
    tokens = _split(logits), _split(hides)
    nothing = jnp.full_like(tokens[0][0], EMPTY_LOG_SUM), jnp.zeros_like(tokens[1][0])
    last, within = lax.scan(add, nothing, tokens)
    # Not a scan by halves, which XLA would compute anew for every token of a chunk.
    begin = jax.tree.map(lambda x: x[0], nothing)
    before = lax.scan(lambda carry, last: (join(carry, last), carry[0]), begin, last)[1]
    return _join(jnp.logaddexp(before[None] + within[1], within[0]), len(logits))


def _log_sums_forward(logits, starts):
    sums = _log_sums(logits, starts)
    return sums, (logits, starts, sums)


def _log_sums_backward(saved, cotangent):
    """Each token's cotangent goes to all before it, by their weights in its sum.

    later_t = g_t + exp(L_t - L_(t+1)) later_(t+1),   dl_t = exp(l_t - L_t) later_t
    """
    logits, starts, sums = saved
    decay = jnp.where(starts[1:], 0.0, jnp.exp(sums[:-1] - sums[1:]))
    decay = jnp.concatenate([decay, jnp.zeros_like(sums[:1])])

    def add(carry, token):
        (later, through), (given, decay) = carry, token
        carry = given + decay * later, decay * through
        return carry, carry

    def hand_on(later, first):
        return first[0] + first[1] * later, later

    tokens = _split(cotangent), _split(decay)
    nothing = jnp.zeros_like(tokens[0][0]), jnp.ones_like(tokens[1][0])
    first, (within, through) = lax.scan(add, nothing, tokens, reverse=True)
    after = lax.scan(hand_on, nothing[0][0], first, reverse=True)[1]
    later = _join(within + through * after[None], len(logits))
    return jnp.exp(logits - sums) * later, None


_log_sums.defvjp(_log_sums_forward, _log_sums_backward)


def _split(x: Array) -> Array:
    """(T, ...) to (chunk size, chunks, ...), the last chunk filled up with zeros."""
    size = min(_CHUNK_SIZE, len(x))
    x = jnp.pad(x, ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(-1, size, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, length: int) -> Array:
    """Undoes `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:length]
