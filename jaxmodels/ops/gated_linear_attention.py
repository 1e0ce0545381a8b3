"""Linear attention whose memory fades: by a factor a head, or a factor a channel of the keys."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.batched_product import batched_product, transposed
from jaxmodels.ops.checks import require_within
from jaxmodels.ops.chunks import (
    ChunkDocuments,
    chunk_decays,
    chunk_documents,
    decayed_products,
    fit_chunk_size,
    join_chunks,
    split_chunks,
)
from jaxmodels.ops.recurrence import run_recurrence
from jaxmodels.ops.segments import document_starts


def scalar_gated_linear_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    log_decay: Float[Array, "*B T H"],
    *,
    initial_state: Float[Array, "*B H K V"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K V"]]:
    """Linear attention with a memory that fades by one factor a head and step.

    S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T,   out_t = S_t^T q_t

    The state-space duality of Mamba-2 with C, B, dt x and dt A for q, k, v and
    log_decay. "chunked" forms the products of all chunks at once and carries the
    state between them: time O(T (chunk_size + K) V), memory
    O(T (chunk_size + K V / chunk_size)). "parallel" is one chunk for all of T, with
    T x T products; "recurrent" takes one token at a time.

    Args:
      q, k: queries and keys, scaled by the caller.
      v: values.
      log_decay: at most 0; 0 forgets nothing and -inf everything before.
      initial_state: memory of the first document before this call; None is zeros.
      segment_ids: of the documents; the memory begins empty at every border.
      form: "chunked", "parallel" or "recurrent".
      chunk_size: tokens handled at once, rounded up to a power of two; any T will do.

    Returns:
      The outputs in v's dtype, and the memory of the last document in float32.

    Raises:
      ValueError: shapes disagree, a log decay is positive, the form is unknown or
        chunk_size < 1.

    Source: Dao and Gu 2024, "Transformers are SSMs", sections 5 and 6
    (arXiv:2405.21060).
    """
    name = "scalar_gated_linear_attention"
    require_within(name, "log_decay", log_decay, -jnp.inf, 0.0)
    return run_recurrence(
        name,
        SCALAR_GATED_FORMS,
        q,
        k,
        v,
        {"log_decay": log_decay},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
    )


def gated_linear_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    log_decay: Float[Array, "*B T H K"],
    *,
    initial_state: Float[Array, "*B H K V"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 32,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K V"]]:
    """Linear attention with a memory whose every row fades by a factor of its own.

    S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T,   out_t = S_t^T q_t

    Forms and costs as in `scalar_gated_linear_attention`; the products inside a
    chunk take O(log chunk_size) passes over q, k and the decays, because each
    channel of a product fades at its own rate (see `ops.chunks.decayed_products`).

    Args:
      q, k, v, initial_state, segment_ids, form, chunk_size: see
        `scalar_gated_linear_attention`.
      log_decay: at most 0, per channel of the keys.

    Returns:
      The outputs in v's dtype, and the memory of the last document in float32.

    Raises:
      ValueError: shapes disagree, a log decay is positive, the form is unknown or
        chunk_size < 1.

    Source: Yang et al. 2023, "Gated Linear Attention Transformers with
    Hardware-Efficient Training", equation 3 and section 4 (arXiv:2312.06635). The
    paper splits a chunk once, into blocks whose diagonal is not a matrix product;
    here it is halved down to single steps.
    """
    name = "gated_linear_attention"
    require_within(name, "log_decay", log_decay, -jnp.inf, 0.0)
    return run_recurrence(
        name,
        {"chunked": _chunked, "parallel": _parallel, "recurrent": _recurrent},
        q,
        k,
        v,
        {"log_decay": log_decay},
        per_channel=["log_decay"],
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
    )


def _scalar_recurrent(q, k, v, log_decay, state, segment_ids, chunk_size):
    return _recurrent(q, k, v, log_decay[..., None], state, segment_ids, chunk_size)


def _scalar_parallel(q, k, v, log_decay, state, segment_ids, chunk_size):
    return _scalar_chunked(q, k, v, log_decay, state, segment_ids, q.shape[1])


def _scalar_chunked(q, k, v, log_decay, state, segment_ids, chunk_size):
    length = q.shape[1]
    (q, k, v, log_decay), documents = _split(q, k, v, log_decay, segment_ids, chunk_size)
    decays = chunk_decays(log_decay, documents)
    products = batched_product(q, k.swapaxes(-1, -2)) * decays.pairs
    q, k = q * decays.from_start[..., None], k * decays.to_end[..., None]
    out, state = _carry(products, q, k, v, decays.through[..., None], state)
    return join_chunks(out, length), state


def _recurrent(q, k, v, log_decay, state, segment_ids, chunk_size):
    """The definition, a token at a time; log_decay is (B, T, H, K) or (B, T, H, 1)."""
    decay = jnp.exp(log_decay)
    if segment_ids is not None:
        # What comes before the first token is of its document.
        starts = document_starts(segment_ids).at[:, 0].set(False)
        decay = jnp.where(starts[..., None, None], 0.0, decay)

    def step(state, token):
        q, k, v, decay = token
        state = decay[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay))
    state, out = lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


def _parallel(q, k, v, log_decay, state, segment_ids, chunk_size):
    return _chunked(q, k, v, log_decay, state, segment_ids, q.shape[1])


def _chunked(q, k, v, log_decay, state, segment_ids, chunk_size):
    length = q.shape[1]
    (q, k, v, log_decay), documents = _split(q, k, v, log_decay, segment_ids, chunk_size)
    (products,), decays = decayed_products([q], k, log_decay, documents)
    q, k = q * decays.from_start, k * decays.to_end
    out, state = _carry(products, q, k, v, decays.through, state)
    return join_chunks(out, length), state


def _split(
    q, k, v, log_decay, segment_ids, chunk_size
) -> tuple[list[Array], ChunkDocuments | None]:
    size = fit_chunk_size(chunk_size, q.shape[1])
    documents = None if segment_ids is None else chunk_documents(segment_ids, size)
    return [split_chunks(x, size) for x in (q, k, v, log_decay)], documents


def _carry(
    products: Float[Array, "N B H C C"],
    q: Float[Array, "N B H C K"],
    k_to_end: Float[Array, "N B H C K"],
    v: Float[Array, "N B H C V"],
    through: Float[Array, "N B H #K"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "N B H C V"], Float[Array, "B H K V"]]:
    """Adds what all chunks know alone to what reaches them through the state.

    Args:
      products: of queries and keys, faded and masked.
      q: as they meet the state before the chunk.
      k_to_end: as they reach the state after it.
      v: values.
      through: what is left of the state after the chunk.
      state: before the first chunk.
    """
    writes = batched_product(transposed(k_to_end), v)

    def step(state, chunk):
        write, through = chunk
        return through[..., None] * state + write, state

    state, before = lax.scan(step, state, (writes, through))
    return batched_product(products, v) + batched_product(q, before), state


# Shared with retention, whose gate is a special case.
SCALAR_GATED_FORMS = {
    "chunked": _scalar_chunked,
    "parallel": _scalar_parallel,
    "recurrent": _scalar_recurrent,
}
