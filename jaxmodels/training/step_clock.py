"""Where a run's time goes: to input, computing and checkpoints; and a trace to look into."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxmodels.training.flops import peak_flops, step_flops

# Steps of a trace: enough to see what repeats, few enough to open in a browser. The first
# ones compile and fill queues.
_TRACE_FROM, _TRACE_STEPS = 5, 5


class StepClock:
    """Adds up seconds by what the host was doing.

    The device computes while the host reads, so time of reading is lost only where
    it is longer than computing; "compute" is the time that the host waits for results.
    The first step, which compiles, is counted by itself.
    """

    def __init__(self):
        self.steps = 0
        self.seconds = {"input": 0.0, "compute": 0.0, "checkpoint": 0.0}
        self.first_step = 0.0
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside a `with` as input, compute or checkpoint."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def tick(self) -> None:
        """A step has ended."""
        self.steps += 1
        if self.steps == 1:
            self.first_step = time.perf_counter() - self._began
            self.seconds = dict.fromkeys(self.seconds, 0.0)

    def report(self, step: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Milliseconds a step by part, its operations, and the share of the machine's peak.

        Args:
          step: the compiled step, and a call's arguments; a step that is not compiled
            by `jax.jit` has no operations to count.
        """
        steps = max(self.steps - 1, 1)
        report = {f"{name}_ms": 1e3 * s / steps for name, s in self.seconds.items()}
        report = {"steps": self.steps, "first_step_seconds": self.first_step, **report}
        total = sum(self.seconds.values()) / steps
        if self.steps > 1 and hasattr(step, "trace"):
            products, counted = step_flops(step, *arguments)
            devices = len({d for x in jax.tree.leaves(arguments[0]) for d in _devices(x)})
            peak = peak_flops(devices)
            report |= {"flops": products, "xla_flops": counted, "peak_flops": peak}
            report["utilisation"] = products / total / peak
        return report


def describe(report: dict[str, Any]) -> str:
    """One line of what `StepClock.report` returned."""
    parts = ("input", "compute", "checkpoint")
    total = sum(report[f"{part}_ms"] for part in parts)
    split = ", ".join(f"{part} {report[f'{part}_ms']:.3g}" for part in parts)
    text = f"{total:.3g} ms a step ({split}; first {report['first_step_seconds']:.1f} s)"
    if "flops" in report:
        text += (
            f", {report['flops'] / 1e9:.3g} GFLOP, {100 * report['utilisation']:.0f} % of "
            f"{report['peak_flops'] / 1e12:.3g} TFLOP/s"
        )
    return text


class Trace:
    """Records a few steps for XProf or Perfetto, if asked to.

    Args:
      directory: where `plugins/profile/` goes; None records nothing.
    """

    def __init__(self, directory: Path | None):
        self._directory, self._running = directory, False

    def tick(self, steps: int) -> None:
        """So many steps have ended."""
        if self._directory is None:
            return
        if steps == _TRACE_FROM:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._running = True
        if steps == _TRACE_FROM + _TRACE_STEPS:
            self.close()

    def close(self) -> None:
        """Ends a recording; a run of few steps has a shorter one."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def _devices(leaf: Any) -> set[Any]:
    return leaf.devices() if isinstance(leaf, jax.Array) else set()
