"""Attention of FLASH: quadratic inside a chunk, linear between chunks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.ops.attention_sparse import with_neighbours
from jaxmodels.ops.batched_product import batched_product
from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.gated_attention import keys_seen
from jaxmodels.ops.segments import document_index, document_positions


class MixedChunkState(NamedTuple):
    """What the next tokens of a document need; its size does not grow.

    Fields:
      quad_k, lin_k, v: of the last C tokens, of which those count that lie in the
        document's unfinished chunk.
      memory: sum of k_s v_s^T over its finished chunks, float32.
      length: tokens of the document so far.
    """

    quad_k: Float[Array, "B C K"]
    lin_k: Float[Array, "B C M"]
    v: Float[Array, "B C E"]
    memory: Float[Array, "B M E"]
    length: Int[Array, "B"]


def empty_mixed_chunk_state(
    batch: int, chunk_size: int, widths: tuple[int, int, int], dtype: DTypeLike
) -> MixedChunkState:
    """The state before the first token.

    Args:
      batch: sequences.
      chunk_size: C.
      widths: of the quadratic keys, the linear keys and the values.
      dtype: of keys and values.
    """
    buffers = (jnp.zeros((batch, chunk_size, width), dtype) for width in widths)
    memory = jnp.zeros((batch, *widths[1:]), jnp.float32)
    return MixedChunkState(*buffers, memory, jnp.zeros(batch, jnp.int32))


def mixed_chunk_attention(
    quad_q: Float[Array, "B T K"],
    quad_k: Float[Array, "B T K"],
    lin_q: Float[Array, "B T M"],
    lin_k: Float[Array, "B T M"],
    v: Float[Array, "B T E"],
    *,
    kernel: str = "relu2",
    causal: bool = False,
    chunk_size: int = 256,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: MixedChunkState | None = None,
    form: str = "chunked",
) -> tuple[Float[Array, "B T E"], MixedChunkState | None]:
    """Attends by squared ReLU (or softmax) within a chunk and linearly beyond it.

    out_t = sum_s f(quad_q_t . quad_k_s) v_s + 1 / n_t sum_r (lin_q_t . lin_k_r) v_r

    s runs over the chunk of t, s <= t if causal, and r over all earlier chunks, or
    over the whole document if not causal; n_t is the number of these r. Either
    f(x) = relu(x)^2 or f = softmax_s. Chunks of C = chunk_size tokens are counted
    from the beginning of each document.

    Time is O(T (C + M)) and memory O(T (C + M E / C)). A chunk of a document meets
    at most two of the sequence, so with several documents, or a state, blocks of
    queries are compared with twice as many keys (three times if not causal), and
    what the linear part owes to those keys is summed there and not in the memory.

    Args:
      quad_q, quad_k, lin_q, lin_k, v: queries and keys of both parts, with all
        scales applied, and values.
      kernel: f, "relu2" or "softmax".
      causal: hides later keys.
      chunk_size: C. Any T will do.
      segment_ids: of the documents.
      initial_state: of the document of the first token; for causal=True.
      form: "chunked"; "parallel" is the definition, with T * T weights.

    Returns:
      The mixed values, in v's dtype, and the state after the last document; None
      if not causal. Sums are in float32 or wider.

    Raises:
      ValueError: shapes disagree, chunk_size < 1, an unknown kernel or form, or a
        state where a future token counts or for the parallel form.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", section 3.2,
    equations 7 and 8, and its pseudocode (arXiv:2202.10447). Deviation:
    the number n_t stands for a constant.
    """
    _check(quad_q, quad_k, lin_q, lin_k, v, kernel, causal, chunk_size, segment_ids)
    batch, length = v.shape[:2]
    if form not in ("chunked", "parallel"):
        _fail(f'form={form!r} is neither "chunked" nor "parallel"')
    if initial_state is not None and (not causal or form == "parallel"):
        _fail(f'initial_state is for causal=True and form="chunked", not {causal} and {form!r}')
    aligned = segment_ids is None and initial_state is None
    state = initial_state
    if state is None:
        widths = quad_k.shape[-1], lin_k.shape[-1], v.shape[-1]
        state = empty_mixed_chunk_state(batch, chunk_size, widths, v.dtype)
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    tokens = _tokens(ids, state.length, chunk_size)
    arrays = quad_q, quad_k, lin_q, lin_k, v
    if form == "parallel":
        out = _parallel(*arrays, tokens, kernel, causal, chunk_size)
    else:
        attend = partial(_chunked, kernel=kernel, causal=causal, size=chunk_size, aligned=aligned)
        out = jax.checkpoint(attend)(*arrays, tokens, state)
    return out, _final_state(quad_k, lin_k, v, tokens, state) if causal else None


def _fail(message: str):
    raise ValueError(f"mixed_chunk_attention: {message}")


def _check(quad_q, quad_k, lin_q, lin_k, v, kernel, causal, chunk_size, segment_ids):
    if chunk_size < 1:
        _fail(f"chunk_size={chunk_size} must be at least 1")
    if kernel not in ("relu2", "softmax"):
        _fail(f'kernel={kernel!r} is neither "relu2" nor "softmax"')
    arrays = {"quad_q": quad_q, "quad_k": quad_k, "lin_q": lin_q, "lin_k": lin_k, "v": v}
    shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
    if any(x.ndim != 3 or x.shape[:2] != v.shape[:2] or 0 in x.shape for x in arrays.values()):
        _fail(f"all must be (B, T, width) of the same B and T, and none empty: {shapes}")
    if quad_q.shape[2] != quad_k.shape[2] or lin_q.shape[2] != lin_k.shape[2]:
        _fail(f"queries and keys must agree in width: {shapes}")
    if segment_ids is not None:
        require_shape(
            "mixed_chunk_attention", "segment_ids", segment_ids, v.shape[:2], "(B, T) of v"
        )


class _Tokens(NamedTuple):
    """Where each token is: its document, its place in it, its chunk counted from left to right."""

    documents: Int[Array, "B T"]
    places: Int[Array, "B T"]
    chunks: Int[Array, "B T"]


def _tokens(ids, seen, size):
    documents = document_index(ids)
    places = document_positions(ids) + jnp.where(documents == 0, seen[:, None], 0)
    # What the state holds of an unfinished chunk is of chunk 0.
    return _Tokens(documents, places, jnp.cumsum(places % size == 0, axis=1, dtype=jnp.int32))


def _buffered(state):
    """Which tokens of the buffers are of the unfinished chunk; 0 there and -1 elsewhere."""
    size = state.v.shape[1]
    return jnp.where(jnp.arange(size)[None] >= size - (state.length % size)[:, None], 0, -1)


def _keys_summed(tokens, causal, size):
    if causal:
        return tokens.places // size * size
    return keys_seen(tokens.documents, causal=False)


def _quadratic(q, k, seen, kernel):
    """f of the logits where seen, zero elsewhere."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = batched_product(q, k.swapaxes(-1, -2), preferred_element_type=wide)
    if kernel == "relu2":
        return jnp.square(jax.nn.relu(jnp.where(seen, logits, 0.0)))
    return jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)


def _linear(q, k, seen):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    products = batched_product(q, k.swapaxes(-1, -2), preferred_element_type=wide)
    return jnp.where(seen, products, 0.0)


def _mean_queries(lin_q, tokens, causal, size):
    """Linear queries divided by the number of keys that they sum over."""
    count = jnp.maximum(_keys_summed(tokens, causal, size), 1).astype(jnp.float32)
    return (lin_q / count[..., None]).astype(lin_q.dtype)


def _parallel(quad_q, quad_k, lin_q, lin_k, v, tokens, kernel, causal, size):
    def pairs(x):
        return x[:, :, None], x[:, None, :]

    (of_query, of_key), (document, other) = pairs(tokens.chunks), pairs(tokens.documents)
    near, far = of_query == of_key, document == other
    if causal:
        near = near & jnp.tril(jnp.ones(near.shape[1:], bool))[None]
        far = far & (of_query > of_key)
    lin_q = _mean_queries(lin_q, tokens, causal, size)
    weights = _quadratic(quad_q, quad_k, near, kernel) + _linear(lin_q, lin_k, far)
    return jnp.einsum("bts,bse->bte", weights.astype(v.dtype), v)


# What follows works on blocks of the sequence, (B, N, L, ...), with L = chunk_size
# unless one block holds all tokens. Each meets a window of keys, (B, N, S, ...).


class _Keys(NamedTuple):
    """Keys and values with their documents and chunks, -1 for what is not there."""

    quad_k: Float[Array, "B N S K"]
    lin_k: Float[Array, "B N S M"]
    v: Float[Array, "B N S E"]
    documents: Int[Array, "B N S"]
    chunks: Int[Array, "B N S"]


def _chunked(quad_q, quad_k, lin_q, lin_k, v, tokens, state, *, kernel, causal, size, aligned):
    batch, length, width = v.shape
    lin_q = _mean_queries(lin_q, tokens, causal, size)
    cut = partial(_blocks, size=min(size, length))
    own = _Keys(
        *map(cut, (quad_k, lin_k, v)),
        *(cut(x, fill=-1) for x in (tokens.documents, tokens.chunks)),
    )
    quad_q, lin_q = cut(quad_q), cut(lin_q)
    before = own if aligned else _previous(own, state) if causal else None
    window = _window(own, before, causal, aligned)
    weights = _weights(quad_q, lin_q, own, window, kernel, causal, aligned)
    out = batched_product(weights.astype(v.dtype), window.v, preferred_element_type=weights.dtype)
    if causal:
        out = out + _recall(lin_q, own.documents, *_memories(before, state.memory))
    elif aligned:
        total = jnp.einsum("bnsm,bnse->bme", own.lin_k, own.v, preferred_element_type=out.dtype)
        out = out + jnp.einsum("bnsm,bme->bnse", lin_q.astype(out.dtype), total)
    else:
        later = _memories(jax.tree.map(lambda x: jnp.flip(x, (1, 2)), own), state.memory)
        for memories in (_memories(own, state.memory), [jnp.flip(x, 1) for x in later]):
            out = out + _recall(lin_q, own.documents, *memories)
    return out.reshape(batch, -1, width)[:, :length].astype(v.dtype)


def _blocks(x, size, fill=0):
    padding = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _previous(own, state):
    """The block of chunk_size tokens before each block; before the first, the buffers."""
    ids = _buffered(state)
    first = _Keys(*(x[:, None] for x in (state.quad_k, state.lin_k, state.v, ids, ids)))

    def shift(first, x):
        # A single block may be shorter than what comes before it.
        return jnp.concatenate([first.astype(x.dtype), x[:, :-1]], 1) if x.shape[1] > 1 else first

    return jax.tree.map(shift, first, own)


def _window(own, before, causal, aligned):
    if aligned or (not causal and own.v.shape[1] == 1):
        return own
    if causal:
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), before, own)
    fills = _Keys(0, 0, 0, -1, -1)
    return jax.tree.map(
        lambda x, fill: jax.vmap(partial(with_neighbours, sides=(1, 1), fill=fill))(x), own, fills
    )


def _weights(quad_q, lin_q, own, window, kernel, causal, aligned):
    """Of the tokens of the window: all of the own chunk's, and those linear ones no memory has."""
    size, keys = own.v.shape[2], window.v.shape[2]
    chunk, other = own.chunks[..., None], window.chunks[:, :, None]
    near = chunk == other
    first = keys - size if causal else (keys - size) // 2
    distance = first + jnp.arange(size)[:, None] - jnp.arange(keys)[None, :]
    if causal:
        near = near & (distance >= 0)[None, None]
    weights = _quadratic(quad_q, window.quad_k, near, kernel)
    if aligned:
        return weights
    far = own.documents[..., None] == window.documents[:, :, None]
    if causal:
        far = far & (chunk > other)
    else:
        slots = jnp.arange(keys)
        far = far & ((slots >= first) & (slots < first + size))[None, None, None]
    return weights + _linear(lin_q, window.lin_k, far)


def _memories(before, first):
    """Sums of k v^T over all blocks that lie before each one, of the last document there.

    Args:
      before: the block before each block; its sum is in the next one's memory.
      first: the memory of the first block, of document 0.

    Returns:
      The memories (B, N, M, E), and the document (B, N) of each.
    """
    last = jnp.maximum(before.documents[:, :, -1], 0)
    owners = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
    counted = before.documents == last[..., None]
    added = jnp.einsum(
        "bnsm,bnse->nbme",
        jnp.where(counted[..., None], before.lin_k, 0),
        before.v,
        preferred_element_type=first.dtype,
    )

    def step(memory, inputs):
        added, kept = inputs
        return jnp.where(kept[:, None, None], memory, 0) + added, memory

    _, memories = lax.scan(step, first, (added, (owners == last).T))
    return memories.swapaxes(0, 1), owners


def _recall(lin_q, documents, memories, owners):
    out = batched_product(lin_q.astype(memories.dtype), memories)
    return jnp.where((documents == owners[..., None])[..., None], out, 0.0)


def _final_state(quad_k, lin_k, v, tokens, state):
    size = state.v.shape[1]
    length = tokens.places[:, -1] + 1
    last = tokens.documents[:, -1:]
    buffered = _buffered(state)
    begun = (length // size * size)[:, None]
    # All that is buffered is of document 0, whose chunk may now be finished.
    places = state.length[:, None] - size + jnp.arange(size)[None]
    new = (tokens.documents == last) & (tokens.places < begun)
    old = (buffered == last) & (places < begun)
    ended = jnp.concatenate([old, new], 1)
    joined = [
        jnp.concatenate([old, new.astype(old.dtype)], 1)
        for old, new in zip(state[:3], (quad_k, lin_k, v), strict=True)
    ]
    memory = jnp.einsum(
        "bsm,bse->bme",
        jnp.where(ended[..., None], joined[1], 0),
        joined[2],
        preferred_element_type=state.memory.dtype,
    )
    memory = memory + jnp.where((last == 0)[..., None], state.memory, 0.0)
    return MixedChunkState(*(x[:, -size:] for x in joined), memory, length)
