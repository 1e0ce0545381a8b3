"""Attention whose similarity is an inner product of features, so that sums can be shared."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.batched_product import batched_product, transposed
from jaxmodels.ops.chunks import ChunkDocuments, chunk_documents, join_chunks, split_chunks
from jaxmodels.ops.recurrence import run_recurrence
from jaxmodels.ops.segments import document_index, document_starts


def linear_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    *,
    causal: bool = True,
    normalise: bool = True,
    initial_state: Float[Array, "*B H K S"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K S"] | None]:
    """Mixes values by the inner products of queries and keys, without a softmax.

    out_t = sum_s (q_t . k_s) v_s / sum_s (q_t . k_s),   s <= t if causal

    The sum over s is q_t^T (sum_s k_s v_s^T): a (K, V) state takes the place of
    the T x T products. "chunked" is quadratic inside a chunk and carries the state
    between chunks, from both sides if not causal: time O(T (chunk_size + K) V),
    memory O(T (chunk_size + K V / chunk_size)). "parallel" is the definition, with
    all T x T products; "recurrent" takes one token at a time.

    Args:
      q, k: queries and keys after their feature map (`ops.feature_maps`).
      v: values.
      causal: hides keys that stand after the query.
      normalise: divides by the sum of the weights. Sums that are not positive
        give what they give; where a sum is zero, the output is zero.
      initial_state: sums over earlier tokens of the first document; None is zeros.
      segment_ids: of the documents, which do not see each other.
      form: "chunked", "parallel" or "recurrent", which is causal only.
      chunk_size: tokens handled at once; any T will do.

    Returns:
      The mixed values in v's dtype, and if causal the sums over the last document,
      sum_s k_s v_s^T, in float32 (else None). With `normalise`, S = V + 1 and the
      last column is sum_s k_s; else S = V.

    Raises:
      ValueError: shapes disagree, the form is unknown or not defined, chunk_size
        < 1, or an initial state without causal=True.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", equations 4 to 12
    (arXiv:2006.16236); the chunked form from Hua et al. 2022, section 3.2
    (arXiv:2202.10447).
    """
    name = "linear_attention" if causal else "linear_attention with causal=False"
    if initial_state is not None and not causal:
        raise ValueError(
            f"{name}: initial_state {initial_state.shape} holds earlier tokens, which only a "
            f"causal call continues; pass None or causal=True"
        )
    mixed, state = run_recurrence(
        name,
        _CAUSAL if causal else _BIDIRECTIONAL,
        q,
        k,
        with_weight(v) if normalise else v,
        {},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
    )
    out = over_weight(mixed) if normalise else mixed
    return out.astype(v.dtype), state if causal else None


def with_weight(v: Float[Array, "*B V"]) -> Float[Array, "*B S"]:
    """Appends a value that is always 1: mixed like the others, it sums up the weights."""
    return jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:-1], 1))], axis=-1)


def over_weight(mixed: Float[Array, "*B S"]) -> Float[Array, "*B V"]:
    """Divides mixed values by their last, the sum of the weights; zero where that is zero."""
    weight = mixed[..., -1:]
    return mixed[..., :-1] / jnp.where(weight == 0, 1, weight)


def _parallel(q, k, v, state, segment_ids, chunk_size, *, causal):
    length = q.shape[1]
    index = jnp.zeros(q.shape[:2], jnp.int32)
    if segment_ids is not None:
        index = document_index(segment_ids)
    seen = index[:, :, None] == index[:, None, :]
    if causal:
        seen &= jnp.tril(jnp.ones((length, length), bool))[None]
    products = jnp.einsum("bthk,bshk->bhts", q, k) * seen[:, None]
    out = jnp.einsum("bhts,bshv->bthv", products, v)
    out += jnp.einsum("bthk,bhkv->bthv", q * (index == 0)[..., None, None], state)
    last = index == index[:, -1:]
    final = jnp.einsum("bshk,bshv->bhkv", k * last[..., None, None], v)
    return out, final + state * (index[:, -1] == 0)[:, None, None, None]


def _recurrent(q, k, v, state, segment_ids, chunk_size):
    # What comes before the first token is of its document.
    starts = jnp.zeros(q.shape[:2], bool)
    if segment_ids is not None:
        starts = document_starts(segment_ids).at[:, 0].set(False)

    def step(state, inputs):
        q, k, v, start = inputs
        state = jnp.where(start[:, None, None, None], 0, state) + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    state, out = lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, starts)))
    return jnp.moveaxis(out, 0, 1), state


def _chunked(q, k, v, state, segment_ids, chunk_size, *, causal):
    length = q.shape[1]
    if segment_ids is None and not causal:
        state = jnp.einsum("bshk,bshv->bhkv", k, v)
        return jnp.einsum("bthk,bhkv->bthv", q, state), state
    size = min(chunk_size, length)
    documents = None if segment_ids is None else chunk_documents(segment_ids, size)
    q, k, v = (split_chunks(x, size) for x in (q, k, v))
    products = batched_product(q, k.swapaxes(-1, -2))
    if causal:
        products = jnp.where(jnp.tril(jnp.ones((size, size), bool))[(None,) * 3], products, 0)
    if documents is not None:
        products = jnp.where(documents.same, products, 0)
    outside, state = _outside(q, k, v, state, documents, reverse=False)
    out = batched_product(products, v) + outside
    if not causal:
        mirrored = _mirrored_documents(segment_ids, size)
        out += _outside(q, k, v, jnp.zeros_like(state), mirrored, reverse=True)[0]
    return join_chunks(out, length), state


def _outside(q, k, v, state, documents, *, reverse):
    """What queries get from the chunks before theirs (after it, if reverse), and the last state."""
    through = None
    if documents is not None:
        q = q * documents.from_start[..., None]
        k = k * documents.to_end[..., None]
        through = documents.through[..., None, None]

    def step(state, inputs):
        write, through = inputs
        kept = state if through is None else state * through
        return kept + write, state

    writes = batched_product(transposed(k), v)
    state, before = lax.scan(step, state, (writes, through), reverse=reverse)
    return batched_product(q, before), state


def _mirrored_documents(segment_ids: Int[Array, "B T"], size: int) -> ChunkDocuments:
    """The chunks' documents with start and end exchanged, for a state that comes from the end."""
    padded = jnp.pad(segment_ids, ((0, 0), (0, -segment_ids.shape[1] % size)), mode="edge")
    same, from_start, to_end, through = chunk_documents(padded[:, ::-1], size)
    return ChunkDocuments(
        same[::-1, ..., ::-1, ::-1],
        from_start[::-1, ..., ::-1],
        to_end[::-1, ..., ::-1],
        through[::-1],
    )


_CAUSAL = {
    "chunked": partial(_chunked, causal=True),
    "parallel": partial(_parallel, causal=True),
    "recurrent": _recurrent,
}
_BIDIRECTIONAL = {
    "chunked": partial(_chunked, causal=False),
    "parallel": partial(_parallel, causal=False),
}
