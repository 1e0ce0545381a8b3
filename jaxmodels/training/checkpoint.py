"""Checkpoints that survive: written aside and renamed by Orbax, checked when read.

Orbax makes a checkpoint visible only when it is complete. What it cannot see
is damage done later, so every array's checksum is stored beside it; a
checkpoint that cannot be read whole is passed over for the one before.
"""

import shutil
import textwrap
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxmodels.training import processes
from jaxmodels.training.checksums import checksums, require_checksums, require_same_arrays

# Of Orbax's own files, generously.
_OVERHEAD_BYTES = 256 * 2**10


class Checkpointer:
    """Saves and restores a state with the facts that belong to it.

    Args:
      directory: made if missing; one run's checkpoints, a folder per step.
      keep: how many of the latest to keep. At least 2, or a damaged one would
        have no predecessor.

    Raises:
      ValueError: `keep` below 2.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        if keep < 2:
            raise ValueError(
                f"Checkpointer: keep={keep} leaves nothing to fall back on; pass at least 2"
            )
        self._directory = Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._writer, self._pending = ThreadPoolExecutor(1, "checkpoint"), None

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; training may go on (and donate `state`) at once.

        Args:
          step: number of the checkpoint.
          state: a tree of arrays.
          facts: JSON-serialisable values: configuration, data position.

        Raises:
          OSError: this or the previous checkpoint could not be written. Those
            before it are untouched.
        """
        self.wait()
        try:
            self._require_room(state)
        except OSError as error:
            raise self._write_error(step, error) from error
        if jax.process_count() == 1:
            self._pending = self._writer.submit(self._write, step, _copied(state), dict(facts))
        else:
            # Processes meet while they write, which must not mix with training's meetings.
            self._write(step, state, dict(facts))

    def _write(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        try:
            saved = {"facts": facts, "checksums": checksums(state)}
            parts = {"state": ocp.args.StandardSave(state), "facts": ocp.args.JsonSave(saved)}
            self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
        except Exception as error:
            raise self._write_error(step, error) from error

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._write_error(None, error) from error

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        Args:
          like: a state of the same structure; shapes, dtypes and shardings of
            the result follow it.

        Returns:
          `(state, facts)`, or None when there is no checkpoint at all.

        Raises:
          ValueError: the newest one is of another model or optimizer.
          OSError: there are checkpoints, and every one is damaged. They stay in the
            directory, under names that begin with "damaged".
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            restored, problem = None, ""
            try:
                saved = self._read_facts(step)
            except Exception as error:
                problem = _first_line(error)
            else:
                require_same_arrays(like, saved["checksums"])
                try:
                    restored = self._read_state(step, like, saved["checksums"]), saved["facts"]
                except Exception as error:
                    problem = _first_line(error)
            # Every process has read another part of it.
            problem = next(filter(None, processes.gather(problem)), "")
            if not problem:
                return restored
            if processes.is_first():
                warnings.warn(
                    f"checkpoint {self._directory / str(step)} is damaged and passed over: "
                    f"{problem}",
                    stacklevel=2,
                )
            self._set_aside(step)
        if steps:
            raise OSError(
                f"Checkpointer: none of the checkpoints {steps} in {self._directory} can be read; "
                "start anew in another directory"
            )
        return None

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def facts(self) -> dict[str, Any] | None:
        """The facts of the newest checkpoint whose facts can be read, or None."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._read_facts(step)["facts"]
            except Exception as error:
                # restore() is the one to warn; here an older answer serves as well.
                del error
        return None

    def close(self) -> None:
        """Waits for pending writes and releases threads.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._manager.close()

    def _read_facts(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(facts=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["facts"]

    def _read_state(self, step: int, like: Any, expected: Mapping[str, Any]) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self._manager.restore(step, args=args)["state"]
        require_checksums(state, expected)
        return state

    def _set_aside(self, step: int) -> None:
        """Training will come by this step again and must be able to save it."""
        if processes.is_first():
            place = self._directory / f"damaged_{step}"
            shutil.rmtree(place, ignore_errors=True)
            (self._directory / str(step)).rename(place)
        processes.gather(None)
        self._manager.reload()

    def _require_room(self, state: Any) -> None:
        """Refuses beforehand: a write that fails half-way costs time and a page of tracebacks."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD_BYTES
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(
                f"no space left: {free / 2**20:.1f} MiB free, {needed / 2**20:.1f} needed"
            )

    def _write_error(self, step: int | None, error: Exception) -> OSError:
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        kept = sorted(s for s in self._manager.all_steps() if s != step)
        return OSError(
            f"Checkpointer: {what} could not be written to {self._directory}: "
            f"{_first_line(error)}. Complete checkpoints there: {kept or 'none'}; "
            "make room and run the same command again"
        )


def _copied(state: Any) -> Any:
    """Another state, made by the devices while this process goes on; the step may take the first.

    Checksums and files are then made from it beside the training.
    """

    def copied(leaf):
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, leaf.sharding, may_alias=False)
        return np.array(leaf)

    return jax.tree.map(copied, state)


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {textwrap.shorten(text, 160)}"
