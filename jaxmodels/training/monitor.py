"""Looks at what steps return, records it, and recognises what must not go on."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.training import processes
from jaxmodels.training.logging import MetricLog, ProgressReport
from jaxmodels.training.loss_scale import MINIMUM
from jaxmodels.training.sharding import path_name


class NonFiniteError(ArithmeticError):
    """A step produced a value that is not finite.

    Attributes:
      drawn: the number of the batch, counted from the first of the run.
    """

    drawn: int = 0


class Monitor:
    """Looks at each step's metrics while the next step runs, so that neither waits.

    Args:
      params: parameters, for their names.
      directory: of the records; only the first process writes.
      description: shown beside the progress.
      done: steps done before.
      steps: the last step.
      log_every: steps between records.
      on_nan: "stop", "skip" or "rollback".
    """

    def __init__(
        self,
        params: Any,
        directory: Path,
        *,
        description: str,
        done: int,
        steps: int,
        log_every: int,
        on_nan: str,
    ):
        paths, _ = jax.tree_util.tree_flatten_with_path(params)
        self._names = [path_name(path) for path, _ in paths]
        self._description, self._steps, self._log_every = description, steps, log_every
        self._on_nan, self._skipped, self._pending = on_nan, 0, None
        self._log = self._progress = None
        if processes.is_first():
            self._log = MetricLog(directory, resume_step=done)
            self._progress = ProgressReport(description, steps, done)

    def __enter__(self) -> "Monitor":
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(*exception)
            self._log.close()

    def look(self, step: int, drawn: int, batch: Any, metrics: dict[str, Any]) -> None:
        """Looks at the step before, and keeps this one's metrics, which may not exist yet.

        Raises:
          NonFiniteError: as `finish`.
        """
        self.finish()
        self._pending = (step, drawn, batch, metrics)

    def finish(self) -> None:
        """Looks at the last step.

        Raises:
          NonFiniteError: its loss or a gradient is not finite, and was not skipped; or a
            float16 run's loss scale has fallen to its minimum.
          ValueError: steps are to be skipped, and the step function cannot.
        """
        if self._pending is None:
            return
        (step, drawn, batch, metrics), self._pending = self._pending, None
        metrics = dict(metrics)
        loss, bad = float(metrics["loss"]), int(metrics.pop("first_nonfinite"))
        if bad >= 0 or not np.isfinite(loss):
            self._judge(step, drawn, batch, metrics, loss, bad)
        elif self._on_nan == "skip" and "skipped" not in metrics:
            raise ValueError(
                'fit: on_nan="skip" needs a step that can leave an update out; make it with '
                "make_step(..., skip_nonfinite=True)"
            )
        if self._log is not None:
            self._progress.update(step, {"loss": loss})
            if step % self._log_every == 0 or step == self._steps:
                numbers = {name: float(value) for name, value in metrics.items()}
                self._log.write(step, {k: v for k, v in numbers.items() if math.isfinite(v)})

    def rewind(self, step: int) -> None:
        """Forgets what came after a step."""
        self._pending = None
        if self._log is not None:
            self._log.rewind(step)

    def say(self, text: str) -> None:
        """One line for people, from the first process."""
        if self._log is not None:
            print(f"{self._description}: {text}", flush=True)

    def _judge(self, step, drawn, batch, metrics, loss, bad) -> None:
        if not metrics.get("skipped"):
            error = NonFiniteError(
                f"fit: step {step}: {self._culprit(batch, loss, bad)} is not finite (loss {loss}). "
                "Checkpoints of earlier steps are intact; lower the learning rate, clip "
                "gradients, or look at that tensor"
            )
            error.drawn = drawn
            raise error
        scale = metrics.get("loss_scale")
        if scale is None:
            self._skipped += 1
            culprit = self._culprit(batch, loss, bad)
            self.say(f"step {step}: {culprit} is not finite; update left out ({self._skipped})")
        elif float(scale) <= MINIMUM:
            raise NonFiniteError(
                f"fit: step {step}: the loss scale of float16 fell to its minimum, {MINIMUM:.2g}, "
                f"and {self._culprit(batch, loss, bad)} still is not finite. Checkpoints of "
                "earlier steps are intact; use bfloat16, or lower the learning rate"
            )

    def _culprit(self, batch, loss, bad) -> str:
        """Names the earliest in the order a step computes: batch, loss, gradient."""
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
            if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                return f"batch[{path_name(path)}]"
        if np.isfinite(loss):
            return f"the gradient of {self._names[bad]}"
        return "the loss" + (f" (and the gradient of {self._names[bad]})" if bad >= 0 else "")
