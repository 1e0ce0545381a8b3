"""Keys and values of earlier tokens, as plain values that a mixer takes and returns.

Keys are stored before any rotation, with their positions, so that a scheme of
positions may depend on the distance to the query or on the length so far.
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
    """

    k: Float[Array, "B L G K"]
    v: Float[Array, "B L G V"]
    positions: Int[Array, "B L"]
    documents: Int[Array, "B L"]
    length: Int[Array, ""]


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
      causally and within their documents. A window is not applied to the mask.

    Raises:
      ValueError: a `KVCache` has no room for them. Where its length is known only
        to the compiled program, the outputs are NaN instead.
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
    slots = jnp.arange(owners.shape[1])
    causal = slots[None, :] <= first + jnp.arange(k.shape[1])[:, None]
    mask = (owners[:, None, :] == documents[:, :, None]) & causal[None]
    seen = Seen(keys, values, places, mask[:, None])
    left = jnp.where(owners == documents[:, -1:], _CURRENT, _GONE)
    if isinstance(cache, RollingCache):
        length = k.shape[1]
        return RollingCache(*(x[:, length:] for x in (keys, values, places, left))), seen
    return KVCache(keys, values, places, left, cache.length + k.shape[1]), seen


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
