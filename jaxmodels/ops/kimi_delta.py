"""The delta rule on a memory of which every row fades at its own rate."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_within
from jaxmodels.ops.chunks import (
    chunk_documents,
    decayed_products,
    fit_chunk_size,
    join_chunks,
    split_chunks,
)
from jaxmodels.ops.delta_chunks import DeltaChunks, mix_delta_chunks, recurrent_delta
from jaxmodels.ops.recurrence import run_recurrence


def kimi_delta_rule(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    log_decay: Float[Array, "*B T H K"],
    beta: Float[Array, "*B T H"],
    *,
    initial_state: Float[Array, "*B H K V"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K V"]]:
    """The gated delta rule with a decay a channel of the key, as in Kimi Delta Attention.

    R_t = diag(exp(log_decay_t)) S_(t-1)
    S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T,   out_t = S_t^T q_t

    Forms and costs as in `ops.delta_rule`, and O(log chunk_size) more passes over
    queries and keys: a product of two steps fades channel by channel, which
    `ops.chunks.decayed_products` does without a T x T x K array.

    Args:
      q, k, v, beta, initial_state, segment_ids, form, chunk_size: see `ops.delta_rule`.
      log_decay: at most 0; 0 is the delta rule and -inf forgets the channel.

    Returns:
      The outputs in v's dtype, and the memory of the last document in float32.

    Raises:
      ValueError: shapes disagree, a decay is outside [0, 1], the form is unknown
        or chunk_size < 1.

    Source: Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention
    Architecture", section 3 (arXiv:2510.26692).
    """
    require_within("kimi_delta_rule", "log_decay", log_decay, -jnp.inf, 0.0)
    return run_recurrence(
        "kimi_delta_rule",
        _FORMS,
        q,
        k,
        v,
        {"log_decay": log_decay, "beta": beta},
        per_channel=("log_decay",),
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
    )


def _recurrent(q, k, v, log_decay, beta, state, segment_ids, chunk_size):
    return recurrent_delta(q, k, v, log_decay, beta, state, segment_ids)


def _parallel(q, k, v, log_decay, beta, state, segment_ids, chunk_size):
    return _chunked(q, k, v, log_decay, beta, state, segment_ids, q.shape[1])


def _chunked(q, k, v, log_decay, beta, state, segment_ids, chunk_size):
    length = q.shape[1]
    size = fit_chunk_size(chunk_size, length)
    documents = None if segment_ids is None else chunk_documents(segment_ids, size)
    q, k, v, log_decay, beta = (split_chunks(x, size) for x in (q, k, v, log_decay, beta))
    (products, overlaps), decays = decayed_products((q, k), k, log_decay, documents)
    chunks = DeltaChunks(
        products=products,
        overlaps=overlaps,
        q=q * decays.from_start,
        k=k * decays.from_start,
        k_to_end=k * decays.to_end,
        through=decays.through,
        v=v,
        beta=beta,
    )
    out, state = mix_delta_chunks(chunks, state)
    return join_chunks(out, length), state


_FORMS = {"chunked": _chunked, "parallel": _parallel, "recurrent": _recurrent}
