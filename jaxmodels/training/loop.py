"""The loop people expect: progress, metrics, checkpoints, resuming, clean stops."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmodels.training import processes
from jaxmodels.training.checkpoint import Checkpointer
from jaxmodels.training.files import write_json
from jaxmodels.training.monitor import Monitor, NonFiniteError
from jaxmodels.training.reader import Reader
from jaxmodels.training.runtime import Runtime, current_runtime
from jaxmodels.training.sharding import shard_batch
from jaxmodels.training.state import TrainState
from jaxmodels.training.step_clock import StepClock, Trace, describe
from jaxmodels.training.stop_signals import StopSignals
from jaxmodels.training.watchdog import Watchdog

# Returns to one checkpoint before it is no single batch's fault.
_MOST_ROLLBACKS = 3


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    batches: Iterator[Any],
    *,
    steps: int,
    directory: str | Path,
    config: Mapping[str, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    checkpoint_every: int = 100,
    keep: int = 2,
    log_every: int = 10,
    description: str = "training",
    runtime: Runtime | None = None,
) -> TrainState:
    """Trains until `steps`, going on from the newest checkpoint in `directory`.

    A resumed run ends with the same bits as an undisturbed one: parameters,
    optimizer, average, keys and data position all come from the checkpoint. With
    several processes all of them call this, with their own parts of the batches.

    Args:
      state: from `init_state`; used as it is when there is no checkpoint.
      step: from `make_step`.
      batches: yields trees of NumPy arrays; has `get_state` and `set_state`, as
        Grain's iterators do, so that its position is saved and restored.
      steps: the step to stop at.
      directory: gets `checkpoints/`, `metrics.jsonl`, TensorBoard events and
        `timing.json`: where a step's time went, and its operations.
      config: JSON values that determine the result. A checkpoint made under
        another one is refused.
      mesh: where batches go, the one `state` was made on; None means one device.
      checkpoint_every: steps between checkpoints; the last step makes one too.
      keep: how many checkpoints to keep.
      log_every: steps between records of metrics.
      description: shown beside the progress.
      runtime: what to do about faults; None is what the command line asked for.

    Returns:
      The final state.

    Raises:
      ValueError: the checkpoint belongs to another configuration, or `batches`
        has no position or ends too early.
      NonFiniteError: a loss or gradient is not finite; names step and tensor.
      OSError: a checkpoint could not be written; earlier ones are intact.
      SystemExit: on SIGTERM (status 143) or SIGINT (130), after saving. A step that
        hangs ends the process with status 75.
    """
    directory, config = Path(directory), dict(config or {})
    runtime = current_runtime() if runtime is None else runtime
    reader, clock = Reader(batches), StepClock()
    with (
        contextlib.closing(Checkpointer(directory / "checkpoints", keep=keep)) as checkpoints,
        contextlib.closing(Trace(directory / "trace" if runtime.profile else None)) as trace,
        Watchdog(runtime.stall_seconds, description) as watchdog,
        StopSignals() as signals,
    ):
        recovery = _Recovery(checkpoints, reader, config)
        state = recovery.resume(state)
        done = int(state.step)
        if runtime.on_nan == "rollback" and not checkpoints.steps():
            checkpoints.save(done, state, recovery.facts())
        with Monitor(
            state.params,
            directory,
            description=description,
            done=done,
            steps=steps,
            log_every=log_every,
            on_nan=runtime.on_nan,
        ) as monitor:
            while done < steps:
                with clock.part("input"):
                    batch = reader.next(done, steps)
                    placed = batch if mesh is None else shard_batch(batch, mesh)
                try:
                    with clock.part("compute"):
                        state, metrics = step(state, placed)
                        done += 1
                        monitor.look(done, reader.drawn, batch, metrics)
                        stop = signals.at(done)
                        due = done % checkpoint_every == 0 or done == steps or stop
                        if due:
                            monitor.finish()
                except NonFiniteError as error:
                    if runtime.on_nan != "rollback" or not error.drawn:
                        raise
                    state = recovery.roll_back(state, error, monitor)
                    done = int(state.step)
                    continue
                if due:
                    with clock.part("checkpoint"):
                        checkpoints.save(done, state, recovery.facts())
                clock.tick()
                trace.tick(clock.steps)
                watchdog.beat(done)
                if stop and done < steps:
                    _exit(checkpoints, stop, monitor, done, directory)
            if clock.steps:
                with clock.part("checkpoint"):
                    checkpoints.wait()
                _report(clock, monitor, directory, step, state, placed)
    return state


class _Recovery:
    """Goes back to checkpoints: at the start, and from values that are not finite."""

    def __init__(self, checkpoints: Checkpointer, reader: Reader, config: Mapping[str, Any]):
        self._checkpoints, self._reader, self._config = checkpoints, reader, config
        self._returned_to: list[int] = []

    def facts(self) -> dict[str, Any]:
        return {"config": self._config, **self._reader.facts()}

    def resume(self, state: TrainState) -> TrainState:
        facts = self._checkpoints.facts()
        if facts is None:
            return state
        if difference := describe_difference(facts["config"], self._config, "checkpoint"):
            raise ValueError(
                f"fit: the checkpoint was made with a different configuration ({difference}); "
                "use those values, or another directory"
            )
        return self._restored(state) or state

    def roll_back(self, state: TrainState, error: NonFiniteError, monitor: Monitor) -> TrainState:
        """The state of the last checkpoint, from which the batch at fault is passed over."""
        self._checkpoints.wait()
        self._reader.avoid(error.drawn)
        state = self._restored(state)
        done = int(state.step)
        self._returned_to.append(done)
        if self._returned_to.count(done) > _MOST_ROLLBACKS:
            raise NonFiniteError(
                f"{error}. Rolled back to step {done} {_MOST_ROLLBACKS} times in vain"
            ) from error
        monitor.rewind(done)
        monitor.say(
            f"{str(error).removeprefix('fit: ').partition('. ')[0]}; rolled back to step {done}, "
            f"batch {error.drawn} will be passed over"
        )
        return state

    def _restored(self, state: TrainState) -> TrainState | None:
        restored = self._checkpoints.restore(state)
        if restored is None:
            return None
        state, facts = restored
        self._reader.go_to(facts, int(state.step))
        return state


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> str:
    """The fields in which two configurations differ, with both values; empty if in none."""
    return "; ".join(
        f"{name}: {where} {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )


def _report(clock, monitor, directory, step, state, batch) -> None:
    report = clock.report(step, state, batch)
    monitor.say(describe(report))
    if processes.is_first():
        write_json(directory / "timing.json", report)


def _exit(checkpoints, stop, monitor, done, directory) -> None:
    checkpoints.wait()
    monitor.say(
        f"{stop.name} at step {done}; saved to {directory}. The same command goes on from there."
    )
    raise SystemExit(128 + stop)
