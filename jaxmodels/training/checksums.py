"""Checksums of arrays, piece by piece as they lie on devices, checked in any other layout."""

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxmodels.training import processes
from jaxmodels.training.sharding import path_name

# A piece is named by where it starts and ends on each axis, "0:4,8:16"; "" is a scalar.
Checksums = dict[str, dict[str, int]]


def checksums(tree: Any) -> Checksums:
    """The CRC-32 of every piece of every array, each computed by a process that holds it.

    Args:
      tree: arrays, keys included, on any devices; every process takes part.

    Returns:
      By the array's path such as `params/head/kernel`, the sums of its pieces by place.
    """
    named = [(path_name(p), x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    found = [(name, place, piece) for name, leaf in named for place, piece in _pieces(leaf)]
    # zlib lets go of the interpreter's lock, and training stands still meanwhile.
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda entry: zlib.crc32(np.ascontiguousarray(entry[2])), found)
        mine = [(name, place, n) for (name, place, _), n in zip(found, sums, strict=True)]
    merged: Checksums = {name: {} for name, _ in named}
    for part in processes.gather(mine):
        for name, place, n in part:
            merged[name][place] = n
    return merged


def require_checksums(tree: Any, expected: Mapping[str, Any]) -> None:
    """Compares arrays with the sums that were saved, whatever meshes the two lie on.

    Args:
      tree: arrays; every process takes part.
      expected: from `checksums`, by way of JSON; of an older checkpoint one number
        for a whole array.

    Raises:
      OSError: an array differs, or is not the shape it was.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if not (sums := expected.get(name)):
            raise OSError(f"the contents of {name} do not match their checksum: there is none")
        whole = None if isinstance(sums, Mapping) else _whole(leaf)
        if whole is not None:
            sums = {_place((), whole.shape): sums}
        elif {place for place, _ in _pieces(leaf)} != set(sums) or jax.process_count() > 1:
            whole = _whole(leaf)
        pieces = dict(_pieces(leaf)) if whole is None else None
        for place, n in sums.items():
            piece = pieces[place] if whole is None else whole[_slices(place)]
            if zlib.crc32(np.ascontiguousarray(piece)) != n:
                raise OSError(f"the contents of {name} do not match their checksum")


def require_same_arrays(tree: Any, expected: Mapping[str, Any]) -> None:
    """Tells a state of another model or optimizer from a damaged one.

    Args:
      tree: arrays, or what has their shapes.
      expected: from `checksums`.

    Raises:
      ValueError: paths or shapes differ; says which.
    """
    now = {
        path_name(path): tuple(_numbers(leaf).shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    if other := sorted(set(now) ^ set(expected)):
        some = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
        raise ValueError(
            f"Checkpointer: the checkpoint is of another model or optimizer: {some} "
            f"{'is' if len(other) == 1 else 'are'} in only one of the two; use another directory, "
            "or the code and options it was made with"
        )
    for name, sums in expected.items():
        there = _shape(sums) if isinstance(sums, Mapping) else now[name]
        if there != now[name]:
            raise ValueError(
                f"Checkpointer: the checkpoint is of another model or optimizer: {name} is {there} "
                f"there and {now[name]} now; use another directory, or the sizes it was made with"
            )


def _shape(sums: Mapping[str, int]) -> tuple[int, ...]:
    """Where the last piece ends on each axis."""
    ends = [[part.stop for part in _slices(place)] for place in sums]
    return tuple(map(max, zip(*ends, strict=True)))


def _pieces(leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The parts of an array that this process answers for."""
    leaf = _numbers(leaf)
    if not isinstance(leaf, jax.Array):
        yield _place((), np.shape(leaf)), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield _place(shard.index, leaf.shape), np.asarray(shard.data)


def _whole(leaf: Any) -> np.ndarray:
    leaf = _numbers(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _numbers(leaf: Any) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    ends = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop in ends)


def _slices(place: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in place.split(",") if part)
