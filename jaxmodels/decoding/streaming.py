"""Tokens handed to a function on the host while the compiled loop goes on."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Int

# A program knows a listener by its number alone, so that another one needs no other program.
_listeners: dict[int, Callable[[np.ndarray], object]] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def listening(stream: Callable[[np.ndarray], object] | None) -> Iterator[Int[Array, ""] | None]:
    """Gives a function a number that `tell` finds it by, for as long as the block lasts.

    Args:
      stream: takes what `tell` sends; None gives None, and nothing is sent.
    """
    if stream is None:
        yield None
        return
    number = next(_numbers)
    _listeners[number] = stream
    try:
        yield jnp.int32(number)
        jax.effects_barrier()
    finally:
        del _listeners[number]


def tell(listener: Int[Array, ""] | None, tokens: Int[Array, "B"]) -> None:
    """Sends tokens to the listener of that number, in the order of calls."""
    if listener is not None:
        io_callback(_call, None, listener, tokens, ordered=True)


def _call(listener, tokens) -> None:
    _listeners[int(listener)](np.asarray(tokens))
