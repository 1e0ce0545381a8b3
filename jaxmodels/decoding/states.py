"""States of language models taken back: guesses that were refused have never been read."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxmodels.layers.mixers.cache import KVCache, keep_path, shorten


def is_cached(state: Any) -> bool:
    """Whether a model's state is caches of all tokens, which can be shortened."""
    return all(isinstance(x, KVCache) for x in jax.tree.leaves(state, is_leaf=_is_cache))


def shorten_all(state: Any, length: int | Int[Array, ""]) -> Any:
    """`cache.shorten` in every layer."""
    return _map_caches(lambda cache: shorten(cache, length), state)


def with_tree(state: Any, among: Bool[Array, "N N"]) -> Any:
    """Lets the tokens of the next call see each other as `among` says, in every layer."""
    return _map_caches(lambda cache: cache._replace(among=among), state)


def keep_path_all(
    state: Any, start: Int[Array, ""], path: Int[Array, "B P"], count: Int[Array, ""]
) -> Any:
    """`cache.keep_path` in every layer."""
    return _map_caches(lambda cache: keep_path(cache, start, path, count), state)


def keep_first(
    read: Callable[[Array, Array, Any], tuple[Any, Any]],
    state: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    count: Int[Array, ""],
) -> Any:
    """The state after the first `count` of some tokens, by reading them again.

    For states that cannot be shortened, such as those of recurrences.

    Args:
      read: `(tokens, positions, state) -> (vectors, state)`, of a model.
      state: before the tokens.
      tokens, positions: of the call to take back in part.
      count: from 1 to T.
    """

    def reader(size):
        return lambda state: read(tokens[:, :size], positions[:, :size], state)[1]

    return lax.switch(count - 1, [reader(n + 1) for n in range(tokens.shape[1])], state)


def _map_caches(change, state):
    return jax.tree.map(change, state, is_leaf=_is_cache)


def _is_cache(x) -> bool:
    return isinstance(x, KVCache)
