"""The loop people expect: progress, metrics, checkpoints, resuming, clean stops."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.training.checkpoint import Checkpointer
from jaxmodels.training.logging import MetricLog, ProgressReport
from jaxmodels.training.sharding import path_name, shard_batch
from jaxmodels.training.state import TrainState


class NonFiniteError(ArithmeticError):
    """A step produced a value that is not finite."""


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
) -> TrainState:
    """Trains until `steps`, going on from the newest checkpoint in `directory`.

    A resumed run ends with the same bits as an undisturbed one: parameters,
    optimizer, average, keys and data position all come from the checkpoint.

    Args:
      state: from `init_state`; used as it is when there is no checkpoint.
      step: from `make_step`.
      batches: yields trees of NumPy arrays; has `get_state` and `set_state`, as
        Grain's iterators do, so that its position is saved and restored.
      steps: the step to stop at.
      directory: gets `checkpoints/`, `metrics.jsonl` and TensorBoard events.
      config: JSON values that determine the result. A checkpoint made under
        another one is refused.
      mesh: where batches go, the one `state` was made on; None means one device.
      checkpoint_every: steps between checkpoints; the last step makes one too.
      keep: how many checkpoints to keep.
      log_every: steps between records of metrics.
      description: shown beside the progress.

    Returns:
      The final state.

    Raises:
      ValueError: the checkpoint belongs to another configuration, or `batches`
        has no position or ends too early.
      NonFiniteError: a loss or gradient is not finite; names step and tensor.
      OSError: a checkpoint could not be written; earlier ones are intact.
      SystemExit: on SIGTERM (status 143) or SIGINT (130), after saving.
    """
    directory, config = Path(directory), dict(config or {})
    _require_position(batches)
    with (
        contextlib.closing(Checkpointer(directory / "checkpoints", keep=keep)) as checkpoints,
        _stop_signals() as stop,
    ):
        state = _resume(checkpoints, state, batches, config)
        done = int(state.step)
        progress = ProgressReport(description, steps, done)
        with contextlib.closing(MetricLog(directory, resume_step=done)) as log, progress:
            monitor = _Monitor(state.params, log, progress, log_every, steps)
            while done < steps:
                batch = _next(batches, done, steps)
                placed = batch if mesh is None else shard_batch(batch, mesh)
                state, metrics = step(state, placed)
                done += 1
                monitor.look(done, batch, metrics)
                if done % checkpoint_every == 0 or done == steps or stop:
                    monitor.finish()
                    facts = {"config": config, "data": batches.get_state()}
                    checkpoints.save(done, state, facts)
                if stop and done < steps:
                    _exit(checkpoints, stop[0], description, done, directory)
    return state


class _Monitor:
    """Looks at each step's metrics while the next step runs, so that neither waits."""

    def __init__(self, params, log, progress, log_every, steps):
        paths, _ = jax.tree_util.tree_flatten_with_path(params)
        self._names = [path_name(path) for path, _ in paths]
        self._log, self._progress = log, progress
        self._log_every, self._steps = log_every, steps
        self._pending = None

    def look(self, step, batch, metrics) -> None:
        self.finish()
        self._pending = (step, batch, metrics)

    def finish(self) -> None:
        if self._pending is None:
            return
        (step, batch, metrics), self._pending = self._pending, None
        metrics = dict(metrics)
        loss, bad = float(metrics["loss"]), int(metrics.pop("first_nonfinite"))
        if bad >= 0 or not np.isfinite(loss):
            raise NonFiniteError(self._diagnosis(step, batch, loss, bad))
        self._progress.update(step, {"loss": loss})
        if step % self._log_every == 0 or step == self._steps:
            self._log.write(step, {name: float(value) for name, value in metrics.items()})

    def _diagnosis(self, step, batch, loss, bad) -> str:
        """Names the earliest culprit in the order a step computes: batch, loss, gradient."""
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
            if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                culprit = f"batch[{path_name(path)}]"
                break
        else:
            culprit = f"the gradient of {self._names[bad]}" if np.isfinite(loss) else "the loss"
            if not np.isfinite(loss) and bad >= 0:
                culprit += f" (and the gradient of {self._names[bad]})"
        return (
            f"fit: step {step}: {culprit} is not finite (loss {loss}). Checkpoints of earlier "
            "steps are intact; lower the learning rate, clip gradients, or look at that tensor"
        )


def _require_position(batches: Any) -> None:
    if not (hasattr(batches, "get_state") and hasattr(batches, "set_state")):
        raise ValueError(
            f"fit: batches is a {type(batches).__name__} without get_state and set_state, so its "
            "position could not be resumed; use jaxmodels.data.batches or a Grain iterator"
        )


def _next(batches: Iterator[Any], done: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"fit: batches ended after step {done} of {steps}; let them repeat (num_epochs=None) "
            "or ask for fewer steps"
        ) from None


def _resume(checkpoints, state, batches, config) -> TrainState:
    facts = checkpoints.facts()
    if facts is None:
        return state
    if difference := describe_difference(facts["config"], config, "checkpoint"):
        raise ValueError(
            f"fit: the checkpoint was made with a different configuration ({difference}); "
            "use those values, or another directory"
        )
    restored = checkpoints.restore(state)
    if restored is None:
        return state
    state, facts = restored
    batches.set_state(facts["data"])
    return state


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> str:
    """The fields in which two configurations differ, with both values; empty if in none."""
    return "; ".join(
        f"{name}: {where} {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and SIGINT instead of dying; a second one is not held back."""
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def catch(number, frame):
        caught.append(signal.Signals(number))
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in previous:
        signal.signal(each, catch)
    try:
        yield caught
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _exit(checkpoints, stop, description, done, directory) -> None:
    checkpoints.wait()
    print(
        f"{description}: {stop.name} at step {done}; saved to {directory}. "
        "The same command goes on from there.",
        flush=True,
    )
    raise SystemExit(128 + stop)
