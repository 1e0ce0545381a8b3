"""Documents laid one after the other in a sequence: where each begins and which is which.

A document is a run of equal segment ids. An id that comes back later in the
sequence is another document, which is the only reading a recurrence can have.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def document_starts(segment_ids: Int[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """True at the first position of every document, position 0 included."""
    changed = segment_ids[..., 1:] != segment_ids[..., :-1]
    return jnp.concatenate([jnp.ones_like(changed, shape=(*changed.shape[:-1], 1)), changed], -1)


def document_index(segment_ids: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """Numbers the documents of each sequence 0, 1, 2 ... from left to right."""
    return jnp.cumsum(document_starts(segment_ids), axis=-1, dtype=jnp.int32) - 1


def document_positions(segment_ids: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """Position inside the document, from 0 at its first token."""
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[-1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.where(document_starts(segment_ids), places, 0)
    return places - lax.cummax(begins, axis=begins.ndim - 1)
