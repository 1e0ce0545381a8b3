"""Sequences cut into chunks: what the chunked form of every recurrence shares.

A chunked form does the quadratic work inside all chunks at once and carries a
state from chunk to chunk. Arrays are cut to (N, B, H, C, ...): the chunk first,
because `lax.scan` walks along it, and heads before time, so that what a head
multiplies lies in one piece.

N chunks, C steps in each; the rest of the letters as everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmodels.ops.batched_product import batched_product
from jaxmodels.ops.segments import document_index

# exp(-100) is zero in float32. Sums of larger steps would only lose digits.
_LEAST_LOG_DECAY = -100.0


def fit_chunk_size(chunk_size: int, length: int) -> int:
    """The chunk size rounded up to a power of two, but no longer than `length` needs."""
    return 1 << (min(chunk_size, length) - 1).bit_length()


def split_chunks(x: Num[Array, "B T H ..."], chunk_size: int) -> Num[Array, "N B H C ..."]:
    """Cuts time into chunks, the last one filled up with zeros.

    A step whose key, write strength and log decay are zero changes no state, so
    the padding needs no mask.
    """
    batch, length = x.shape[:2]
    padding = -length % chunk_size
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, -1, chunk_size, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def join_chunks(x: Num[Array, "N B H C ..."], length: int) -> Num[Array, "B T H ..."]:
    """Undoes `split_chunks` of a sequence of `length` steps."""
    x = x.transpose(1, 0, 3, 2, *range(4, x.ndim))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


class ChunkDocuments(NamedTuple):
    """Which steps of a chunk belong together; the heads' axis is 1.

    Attributes:
      same: two steps, of one document.
      from_start: of the document that was running when the chunk began.
      to_end: of the document that is running when the chunk ends.
      through: the chunk is of one document, which also ran before it.
    """

    same: Bool[Array, "N B 1 C C"]
    from_start: Bool[Array, "N B 1 C"]
    to_end: Bool[Array, "N B 1 C"]
    through: Bool[Array, "N B 1"]


def chunk_documents(segment_ids: Int[Array, "B T"], chunk_size: int) -> ChunkDocuments:
    """Finds which steps see each other, the state before the chunk and the one after.

    The padding of the last chunk belongs to the last document, so the state at
    the end is that document's.
    """
    index = document_index(segment_ids)
    index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % chunk_size)), mode="edge")
    index = split_chunks(index[..., None], chunk_size)
    last = index[..., -1]
    # What comes before the first step belongs to its document, number 0.
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    return ChunkDocuments(
        same=index[..., :, None] == index[..., None, :],
        from_start=index == before[..., None],
        to_end=index == last[..., None],
        through=last == before,
    )


class ChunkDecays(NamedTuple):
    """What is left of a memory, in [0, 1]; zero across a border of documents.

    Attributes:
      pairs: at step t (second last axis) of what step s (last) wrote; zero for s > t.
      from_start: at step t, of the state before the chunk.
      to_end: after the chunk, of what step s wrote.
      through: after the chunk, of the state before it.
    """

    pairs: Float[Array, "N B H C C"]
    from_start: Float[Array, "N B H C"]
    to_end: Float[Array, "N B H C"]
    through: Float[Array, "N B H"]


def chunk_decays(
    log_decay: Float[Array, "N B H C"], documents: ChunkDocuments | None
) -> ChunkDecays:
    """Multiplies the decays of single steps up to what a chunked form needs.

    Only exponents <= 0 are exponentiated, and masked ones are replaced before
    that, so that neither values nor gradients can overflow.

    Args:
      log_decay: per step and head, <= 0; -inf is allowed.
      documents: None is one document.
    """
    total = jnp.cumsum(jnp.maximum(log_decay, _LEAST_LOG_DECAY), axis=-1)
    size = log_decay.shape[-1]
    seen = jnp.tril(jnp.ones((size, size), bool))[(None,) * 3]
    pairs = total[..., :, None] - total[..., None, :]
    to_end = total[..., -1:] - total
    if documents is None:
        return ChunkDecays(
            pairs=masked_exp(pairs, seen),
            from_start=jnp.exp(total),
            to_end=jnp.exp(to_end),
            through=jnp.exp(total[..., -1]),
        )
    return ChunkDecays(
        pairs=masked_exp(pairs, seen & documents.same),
        from_start=masked_exp(total, documents.from_start),
        to_end=masked_exp(to_end, documents.to_end),
        through=masked_exp(total[..., -1], documents.through),
    )


def masked_exp(exponent: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """exp where the mask is True and 0 elsewhere, with finite gradients everywhere."""
    return jnp.where(mask, jnp.exp(jnp.where(mask, exponent, 0.0)), 0.0)


class ChannelDecays(NamedTuple):
    """As `ChunkDecays` with a decay a channel; what it has as `pairs` is in the products.

    Attributes:
      from_start: at each step, of the state before the chunk.
      to_end: after the chunk, of what each step wrote.
      through: after the chunk, of the state before it.
    """

    from_start: Float[Array, "N B H C K"]
    to_end: Float[Array, "N B H C K"]
    through: Float[Array, "N B H K"]


def decayed_products(
    rows: Sequence[Float[Array, "N B H C K"]],
    k: Float[Array, "N B H C K"],
    log_decay: Float[Array, "N B H C K"],
    documents: ChunkDocuments | None,
) -> tuple[list[Float[Array, "N B H C C"]], ChannelDecays]:
    """Inner products with keys that have faded, each channel at its own rate, on the way.

    product_ts = sum_i row_ti k_si exp(sum over s < r <= t of log_decay_ri),   s <= t

    A chunk is cut in halves again and again. The steps of a second half see those
    of the first across the cut: what the first half forgets up to the cut scales
    its keys, what the second forgets from there on scales its rows, and the rest
    is a matrix product. So all exponents are sums of log decays, never differences:
    nothing overflows and no digits cancel, whatever the gates.

    Args:
      rows: queries, or keys; each gets its products.
      k: the keys.
      log_decay: per step and channel, <= 0; -inf is allowed.
      documents: None is one document.

    Returns:
      The products, zero for s > t and across documents, and the decays that the
      state needs.
    """
    shape = k.shape
    products, from_start, to_end = _halve(
        [x.reshape(-1, *shape[3:]) for x in rows],
        k.reshape(-1, *shape[3:]),
        log_decay.reshape(-1, *shape[3:]),
    )
    products = [x.reshape(*shape[:4], -1) for x in products]
    from_start, to_end = (jnp.exp(x.reshape(shape)) for x in (from_start, to_end))
    through = from_start[..., -1, :]
    if documents is not None:
        products = [jnp.where(documents.same, x, 0.0) for x in products]
        from_start = jnp.where(documents.from_start[..., None], from_start, 0.0)
        to_end = jnp.where(documents.to_end[..., None], to_end, 0.0)
        through = jnp.where(documents.through[..., None], through, 0.0)
    return products, ChannelDecays(from_start, to_end, through)


def _halve(rows, k, log_decay):
    """Products of all pairs s <= t, and the log decays from the start and to the end.

    The leading axis counts pieces of C steps. More axes would be clearer, but
    XLA's CPU kernels stop at rank 7.
    """
    size, width = k.shape[1:]
    if size == 1:
        products = [jnp.sum(x * k, axis=-1, keepdims=True) for x in rows]
        return products, log_decay, jnp.zeros_like(log_decay)
    half = size // 2
    *rows_of_half, k_of_half, log_of_half = (
        x.reshape(-1, half, width) for x in (*rows, k, log_decay)
    )
    inside, start, end = _halve(rows_of_half, k_of_half, log_of_half)

    def pairs(x):
        return x.reshape(-1, 2, half, x.shape[-1])

    start, end = pairs(start), pairs(end)
    keys = (pairs(k)[:, 0] * jnp.exp(end[:, 0])).swapaxes(-1, -2)
    fade = jnp.exp(start[:, 1])
    products = [
        join_blocks(pairs(block), batched_product(pairs(x)[:, 1] * fade, keys))
        for x, block in zip(rows, inside, strict=True)
    ]
    whole = start[:, :, -1:]
    start = jnp.concatenate([start[:, 0], start[:, 1] + whole[:, 0]], axis=1)
    end = jnp.concatenate([end[:, 0] + whole[:, 1], end[:, 1]], axis=1)
    return products, start, end


def join_blocks(diagonal: Float[Array, "M 2 C C"], below: Float[Array, "M C C"]) -> Array:
    """The (M, 2C, 2C) matrices of two diagonal blocks, one below and zeros above."""
    upper = jnp.concatenate([diagonal[:, 0], jnp.zeros_like(below)], axis=-1)
    lower = jnp.concatenate([below, diagonal[:, 1]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)
