"""Keys and values of earlier tokens, as plain values that a mixer takes and returns.

Keys are stored with their positions, as their scheme has them: turned, where the place
of the key alone says how; before any rotation where the distance to the query or the
length so far matters too.

For decoding that looks ahead, a `KVCache` can be shortened (`shorten`), can take in
a tree of alternatives in one call (its field `among`), and can then keep one path
through that tree alone (`keep_path`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.segments import document_index

# What a slot holds: a token of the document that goes on, or nothing that is still seen.
_CURRENT, _GONE = 0, -1


class KVCache(NamedTuple):
    """Room for `max_length` tokens, filled from the left.

    Fields:
      k, v: (B, L, G, K) and (B, L, G, V).
      positions: (B, L), of the keys.
      documents: (B, L), 0 for keys of the document that goes on, else -1.
      length: how many slots are filled.
      among: (T, T), for the next call alone, which has T tokens: True where the
        token of the row sees that of the column. None is causal.
    """

    k: Float[Array, "B L G K"]
    v: Float[Array, "B L G V"]
    positions: Int[Array, "B L"]
    documents: Int[Array, "B L"]
    length: Int[Array, ""]
    among: Bool[Array, "T T"] | None = None


class RollingCache(NamedTuple):
    """The last tokens alone, as many as a window sees; fields as of `KVCache`."""

    k: Float[Array, "B L G K"]
    v: Float[Array, "B L G V"]
    positions: Int[Array, "B L"]
    documents: Int[Array, "B L"]


class Seen(NamedTuple):
    """What the queries of a call attend to: keys and values, and which of them each sees."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    positions: Int[Array, "B S"]
    mask: Bool[Array, "B 1 T S"]


def empty_cache(
    batch: int, max_length: int, heads: int, widths: tuple[int, int], dtype: DTypeLike
) -> KVCache:
    """A cache for `max_length` tokens with nothing in it.

    Args:
      batch: sequences.
      max_length: tokens of each, prompt and generated together.
      heads: of keys and values.
      widths: of a key and of a value.
      dtype: of keys and values.
    """
    return KVCache(*_slots(batch, max_length, heads, widths, dtype), jnp.int32(0))


def empty_rolling_cache(
    batch: int, window: int, heads: int, widths: tuple[int, int], dtype: DTypeLike
) -> RollingCache:
    """A cache for the last `window` tokens with nothing in it; arguments as `empty_cache`."""
    return RollingCache(*_slots(batch, window, heads, widths, dtype))


def _slots(batch, length, heads, widths, dtype):
    k, v = (jnp.zeros((batch, length, heads, width), dtype) for width in widths)
    places = jnp.zeros((batch, length), jnp.int32)
    return k, v, places, places + _GONE


def tokens_seen(cache: KVCache | RollingCache) -> Int[Array, "B"]:
    """The position that the next token of the document has, when positions are counted."""
    last = jnp.max(jnp.where(cache.documents == _CURRENT, cache.positions, -1), axis=1)
    return last + 1


def extend(
    cache: KVCache | RollingCache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    name: str,
) -> tuple[KVCache | RollingCache, Seen]:
    """Takes new keys and values in.

    Args:
      cache: its last document is continued by the first of the new tokens.
      k, v, positions: of the new tokens.
      segment_ids: of their documents.
      name: of the mixer, for the error.

    Returns:
      The cache that holds them as well, and what the new tokens' queries see,
      causally (or as `among` says) and within their documents. A window is not
      applied to the mask.

    Raises:
      ValueError: a `KVCache` has no room for them, where its length is known; the
        outputs are NaN where only the compiled program knows it. Or `among` is not
        of as many tokens.
    """
    if segment_ids is None:
        documents = jnp.zeros(positions.shape, jnp.int32)
    else:
        documents = document_index(segment_ids)
    new = (k.astype(cache.k.dtype), v.astype(cache.v.dtype), positions, documents)
    if isinstance(cache, RollingCache):
        first = cache.documents.shape[1]
        joined = [jnp.concatenate(pair, axis=1) for pair in zip(cache, new, strict=True)]
    else:
        first = cache.length
        joined = _write(cache, new, name)
    keys, values, places, owners = joined
    among = None if isinstance(cache, RollingCache) else cache.among
    visible = _visible(first, k.shape[1], owners.shape[1], among, name)
    mask = (owners[:, None, :] == documents[:, :, None]) & visible[None]
    seen = Seen(keys, values, places, mask[:, None])
    left = jnp.where(owners == documents[:, -1:], _CURRENT, _GONE)
    if isinstance(cache, RollingCache):
        length = k.shape[1]
        return RollingCache(*(x[:, length:] for x in (keys, values, places, left))), seen
    return KVCache(keys, values, places, left, cache.length + k.shape[1]), seen


def shorten(cache: KVCache, length: int | Int[Array, ""]) -> KVCache:
    """Takes the last tokens out again, all but the first `length`.

    Args:
      cache: what is taken out belongs to the document that goes on.
      length: at most the cache's own.
    """
    filled = jnp.arange(cache.documents.shape[1]) < length
    documents = jnp.where(filled[None], cache.documents, _GONE)
    return cache._replace(documents=documents, length=jnp.asarray(length, jnp.int32))


def keep_path(
    cache: KVCache,
    start: int | Int[Array, ""],
    path: Int[Array, "B P"],
    count: int | Int[Array, ""],
) -> KVCache:
    """Keeps some of the tokens of the last call, moved together.

    Args:
      cache: after a call with `among`.
      start: its length before that call.
      path: which tokens of that call to keep, by their index in it, ascending.
      count: how many of `path` are kept.
    """
    slots = start + path

    def move(x):
        places = slots.reshape(*slots.shape, *(1,) * (x.ndim - 2))
        return lax.dynamic_update_slice_in_dim(
            x, jnp.take_along_axis(x, places, axis=1), start, axis=1
        )

    return shorten(KVCache(*map(move, cache[:4]), cache.length), start + count)


def _visible(first, tokens: int, slots: int, among: Array | None, name: str) -> Array:
    """(T, S): slots before `first`, and of the new tokens' slots those that they may see."""
    if among is None:
        return jnp.arange(slots)[None, :] <= first + jnp.arange(tokens)[:, None]
    if among.shape != (tokens, tokens):
        raise ValueError(
            f"{name}: the state's among {among.shape} must be (T, T) = {(tokens, tokens)}, a row "
            f"and a column a token of this call; set it with state._replace(among=...)"
        )
    before = jnp.broadcast_to(jnp.arange(slots)[None, :] < first, (tokens, slots))
    return lax.dynamic_update_slice_in_dim(before, among, first, axis=1)


def _write(cache: KVCache, new: tuple, name: str) -> list[Array]:
    room, length = cache.k.shape[1], new[0].shape[1]
    known = not isinstance(cache.length, jax.core.Tracer)
    filled = int(cache.length) if known else 0
    if filled + length > room:
        raise ValueError(
            f"{name}: {filled} tokens in the state and {length} more exceed its max_length={room}; "
            f"make it with init_state(batch, max_length={filled + length}) or more"
        )
    k, v, *rest = new
    v = jnp.where(cache.length + length <= room, v, jnp.nan)
    return [
        lax.dynamic_update_slice_in_dim(old, x, cache.length, axis=1)
        for old, x in zip(cache[:4], (k, v, *rest), strict=True)
    ]
