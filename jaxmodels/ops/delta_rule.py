"""Memories that are corrected instead of added to: the delta rule, and with a gate a head."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.batched_product import batched_product
from jaxmodels.ops.checks import require_within
from jaxmodels.ops.chunks import (
    chunk_decays,
    chunk_documents,
    fit_chunk_size,
    join_chunks,
    split_chunks,
)
from jaxmodels.ops.delta_chunks import DeltaChunks, mix_delta_chunks, recurrent_delta
from jaxmodels.ops.recurrence import run_recurrence


def delta_rule(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    beta: Float[Array, "*B T H"],
    *,
    initial_state: Float[Array, "*B H K V"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K V"]]:
    """Linear attention that replaces what the memory holds for a key.

    S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T,   out_t = S_t^T q_t

    With beta = 1 and keys of length 1, reading a key just written gives its value.
    "chunked" solves a triangular system in every chunk, all chunks at once, and
    carries the state between them: time O(T (chunk_size + K) (K + V)), memory
    O(T (chunk_size + K V / chunk_size)). "parallel" is one chunk for all of T, with
    T x T products; "recurrent" takes one token at a time.

    Args:
      q, k: queries and keys, normalised and scaled by the caller; keys longer than
        1 can make the memory grow without bound.
      v: values.
      beta: write strengths, 0 (nothing) to 1 (replace); up to 2 is stable.
      initial_state: memory of the first document before this call; None is zeros.
      segment_ids: of the documents; the memory begins empty at every border.
      form: "chunked", "parallel" or "recurrent".
      chunk_size: tokens handled at once, rounded up to a power of two; any T will do.

    Returns:
      The outputs in v's dtype, and the memory of the last document in float32.

    Raises:
      ValueError: shapes disagree, the form is unknown or chunk_size < 1.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta
    Rule over Sequence Length", section 3 (arXiv:2406.06484).
    """
    return run_recurrence(
        "delta_rule",
        _FORMS,
        q,
        k,
        v,
        {"log_decay": None, "beta": beta},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
    )


def gated_delta_rule(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    log_decay: Float[Array, "*B T H"],
    beta: Float[Array, "*B T H"],
    *,
    initial_state: Float[Array, "*B H K V"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K V"]]:
    """The delta rule on a memory that fades, by a factor a head and step.

    R_t = exp(log_decay_t) S_(t-1)
    S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T,   out_t = S_t^T q_t

    Forms and costs as in `delta_rule`.

    Args:
      q, k, v, beta, initial_state, segment_ids, form, chunk_size: see `delta_rule`.
      log_decay: at most 0; 0 is the delta rule and -inf forgets everything.

    Returns:
      The outputs in v's dtype, and the memory of the last document in float32.

    Raises:
      ValueError: shapes disagree, a decay is outside [0, 1], the form is unknown
        or chunk_size < 1.

    Source: Yang et al. 2024, "Gated Delta Networks", equation 10 and section 3.3
    (arXiv:2412.06464).
    """
    require_within("gated_delta_rule", "log_decay", log_decay, -jnp.inf, 0.0)
    return run_recurrence(
        "gated_delta_rule",
        _FORMS,
        q,
        k,
        v,
        {"log_decay": log_decay, "beta": beta},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
    )


def unit_length(x: Float[Array, "*B K"], *, epsilon: float = 1e-6) -> Float[Array, "*B K"]:
    """x / sqrt(|x|^2 + epsilon) in float32: keys for which the delta rule is stable."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + epsilon)


def _recurrent(q, k, v, log_decay, beta, state, segment_ids, chunk_size):
    per_row = None if log_decay is None else log_decay[..., None]
    return recurrent_delta(q, k, v, per_row, beta, state, segment_ids)


def _parallel(q, k, v, log_decay, beta, state, segment_ids, chunk_size):
    return _chunked(q, k, v, log_decay, beta, state, segment_ids, q.shape[1])


def _chunked(q, k, v, log_decay, beta, state, segment_ids, chunk_size):
    length = q.shape[1]
    size = fit_chunk_size(chunk_size, length)
    documents = None if segment_ids is None else chunk_documents(segment_ids, size)
    q, k, v, beta = (split_chunks(x, size) for x in (q, k, v, beta))
    # Without a gate, all chunks and heads share one set of decays.
    no_decay = jnp.zeros((1, 1, 1, size))
    log_decay = no_decay if log_decay is None else split_chunks(log_decay, size)
    decays = chunk_decays(log_decay, documents)
    keys = k.swapaxes(-1, -2)
    chunks = DeltaChunks(
        products=batched_product(q, keys) * decays.pairs,
        overlaps=batched_product(k, keys) * decays.pairs,
        q=q * decays.from_start[..., None],
        k=k * decays.from_start[..., None],
        k_to_end=k * decays.to_end[..., None],
        through=jnp.broadcast_to(decays.through, beta.shape[:3])[..., None],
        v=v,
        beta=beta,
    )
    out, state = mix_delta_chunks(chunks, state)
    return join_chunks(out, length), state


_FORMS = {"chunked": _chunked, "parallel": _parallel, "recurrent": _recurrent}
