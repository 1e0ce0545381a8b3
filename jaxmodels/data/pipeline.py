"""From examples to an endless, resumable stream of batches.

Every batch is a pure function of (seed, batch number), so the number is the
whole position: workers, prefetching and restarts cannot change what is read.
"""

import atexit
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from jaxmodels import cpu

# First words of the random keys, so that order and what a batch draws never share a stream.
_ORDER, _DRAWS = 0, 1

_RUNNING: weakref.WeakSet["_BatchIterator"] = weakref.WeakSet()


@runtime_checkable
class Dataset(Protocol):
    """What `batches` reads from.

    If it also has `groups`, a number for each example, no batch mixes two of them: they
    tell apart examples of different shapes.
    """

    def __len__(self) -> int:
        """How many examples there are."""

    def batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The examples at `indices` stacked, changed at random by `rng` and nothing else."""

    # Optional, a pair: `compact_batch`, of the same arguments, returns what workers send to
    # the main process, and `finish` makes of it what `batch` returns, in compiled code too.


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    num_workers: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    compact: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An iterator of the data set's batches, dictionaries of arrays, whose position can be saved.

    Each epoch is a new permutation of the data set, of which every process
    reads its own part; what does not fill a batch is dropped, so the shape is
    static and all processes see equally many batches. A data set with `groups`
    is cut into batches group by group, which then come in random order, the
    same group for all processes; groups that never fill a batch are warned of.
    The batches depend on `seed` alone, not on `num_workers`. `get_state()` is a
    small dictionary for JSON; `set_state` of a fresh iterator continues with
    exactly the next batch.

    Args:
      dataset: where the examples come from, an `ImageDataset` for instance.
      batch_size: examples in a batch of this process.
      seed: of the permutations and of what batches draw; not negative.
      num_workers: processes that read ahead; 0 reads ahead in two threads of
        this one, which on two cores is faster even where JPEG files are decoded,
        as nothing is sent. Workers start afresh, so a script that uses them needs
        the usual `if __name__ == "__main__"`; `close()` ends them early.
      shuffle: False keeps the order of the data set.
      num_epochs: passes over the data; None never ends.
      compact: leave to the caller what `dataset.finish` does: pictures stay uint8 on their
        way to the device, and the compiled step calls `dataset.finish(batch)`.
      process_index, process_count: this process among those that train together.

    Returns:
      A Grain iterator.

    Raises:
      ValueError: a number out of its range, more examples in a batch than this process
        reads, or `compact` with a data set that has no such form.
    """
    _check_range("seed", seed, 0)
    _check_range("batch_size", batch_size, 1)
    _check_range("num_workers", num_workers, 0)
    _check_range("process_count", process_count, 1)
    _check_range("process_index", process_index, 0, process_count - 1)
    if num_epochs is not None:
        _check_range("num_epochs", num_epochs, 1)
    share = len(dataset) // process_count
    if batch_size > share:
        raise ValueError(
            f"batches: batch_size={batch_size} is more than the {share} examples that each of "
            f"process_count={process_count} processes reads of {len(dataset)}; pass at most {share}"
        )
    has_compact = hasattr(dataset, "compact_batch")
    if compact and not has_compact:
        raise ValueError(
            f"batches: compact=True needs a data set with `compact_batch` and `finish`, which "
            f"{type(dataset).__name__} lacks; leave it out"
        )
    groups = np.asarray(getattr(dataset, "groups", np.zeros(len(dataset), np.int32)))
    # Sending a batch costs as much as scaling it, so that is left to this process.
    sent = compact or (num_workers > 0 and has_compact)
    read = _ReadBatch(
        dataset, groups, batch_size, seed, shuffle, process_index, process_count, sent
    )
    _check_groups(read)
    count = sys.maxsize if num_epochs is None else num_epochs * read.batches_per_epoch
    return _BatchIterator(read, count, num_workers, finish=sent and not compact)


@dataclasses.dataclass(frozen=True, eq=False)
class _ReadBatch:
    """Batch number -> batch. Whole ones: Grain takes tens of microseconds for every element."""

    dataset: Dataset
    groups: Int[np.ndarray, "N"]
    batch_size: int
    seed: int
    shuffle: bool
    process_index: int
    process_count: int
    compact: bool

    @functools.cached_property
    def batches_per_group(self) -> Int[np.ndarray, "G"]:
        return np.bincount(self.groups) // self.process_count // self.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return int(self.batches_per_group.sum())

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(number, self.batches_per_epoch)
        rng = _generator(self.seed, _DRAWS, number, self.process_index)
        read = self.dataset.compact_batch if self.compact else self.dataset.batch
        return read(self._indices(epoch, place), rng)

    def _indices(self, epoch: int, place: int) -> Int[np.ndarray, "B"]:
        size = len(self.dataset)
        order = _permutation(size, self.seed, epoch) if self.shuffle else np.arange(size)
        if len(self.batches_per_group) > 1:
            if self.shuffle:
                turns = _generator(self.seed, _ORDER, epoch, 0)
                place = turns.permutation(self.batches_per_epoch)[place]
            ends = np.cumsum(self.batches_per_group)
            group = np.searchsorted(ends, place, "right")
            place -= ends[group] - self.batches_per_group[group]
            order = order[self.groups[order] == group]
        mine = order[self.process_index :: self.process_count]
        return mine[place * self.batch_size :][: self.batch_size]


class _BatchIterator(grain.DatasetIterator):
    """Counts batches, so that its state is the same whatever reads ahead below it."""

    def __init__(self, read: _ReadBatch, count: int, num_workers: int, *, finish: bool):
        super().__init__()
        self._read = read
        self._finish = finish
        self._count = count
        self._num_workers = num_workers
        self._position = 0
        self._ahead: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        self.start_prefetch()
        batch = next(self._ahead)
        self._position += 1
        return self._read.dataset.finish(batch) if self._finish else batch

    def get_state(self) -> dict[str, Any]:
        return {"next_batch": self._position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"next_batch"}:
            raise ValueError(
                f"batches: set_state got the keys {sorted(state)}, not 'next_batch'; "
                "pass what get_state returned"
            )
        self._stop()
        self._position = int(state["next_batch"])

    def start_prefetch(self) -> None:
        if self._ahead is None:
            # Grain's workers read absl flags, which only programs built on absl parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            numbers = grain.MapDataset.range(self._position, self._count)
            reads = numbers.map(self._read).to_iter_dataset(
                grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
            )
            self._ahead = iter(
                reads.mp_prefetch(
                    grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2),
                    worker_init_fn=_live_and_die_with_parent,
                )
            )
            _RUNNING.add(self)

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


@atexit.register
def _close_running() -> None:
    """Ends workers while modules still exist; left to the collector they end in tracebacks."""
    for iterator in list(_RUNNING):
        iterator.close()


def _live_and_die_with_parent(worker_index: int, worker_count: int) -> None:
    """A worker leaves signals sent to the whole group to its parent, and dies when that does.

    Its memory is its own, as `cpu.tune` has it: every batch needs as much as the one before.
    """
    cpu.tune()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# Consecutive batches share an epoch, and two epochs can be in flight where they meet.
@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Int[np.ndarray, "N"]:
    return _generator(seed, _ORDER, epoch).permutation(size)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _check_groups(read: _ReadBatch) -> None:
    sizes, counts = np.bincount(read.groups), read.batches_per_group
    if not counts.any():
        raise ValueError(
            f"batches: batch_size={read.batch_size} for process_count={read.process_count} is more "
            f"than any group of examples holds, at most {sizes.max()}; pass less"
        )
    if unread := int(sizes[counts == 0].sum()):
        warnings.warn(
            f"batches: {unread} of {len(read.groups)} examples are never read, because their "
            f"groups do not fill a batch of {read.batch_size}",
            stacklevel=3,
        )


def _check_range(name: str, value: int, low: int, high: int = sys.maxsize) -> None:
    if not low <= value <= high:
        limits = f"at least {low}" if high == sys.maxsize else f"{low} to {high}"
        raise ValueError(f"batches: {name}={value} is out of range; pass {limits}")
