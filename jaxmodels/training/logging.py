"""What a run says: a progress bar or lines for people, JSON lines and events for tools."""

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class MetricLog:
    """Metrics as JSON lines and TensorBoard events in one folder.

    After a resume, records later than the step resumed from are dropped: those
    steps will be run, and recorded, again.

    Args:
      directory: where `metrics.jsonl` and the event files go.
      resume_step: the step training goes on from.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0):
        self._directory = directory
        self._events = None
        self.path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Drops the records of later steps, which will be run again."""
        self.close()
        self._events, self._resume_step = None, step
        kept = [r for r in read_metrics(self.path) if r["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(self.path)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one record."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._writer().add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the event file."""
        if self._events is not None:
            self._events.close()

    def _writer(self) -> Any:
        # Imported late: it is slow to load, and the first step should not wait.
        if self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._directory), purge_step=self._resume_step + 1)
        return self._events


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, oldest first; a line cut off by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class ProgressReport:
    """A bar with rate and time left on a terminal; plain lines elsewhere.

    Args:
      description: what is being done.
      total: number of steps.
      done: steps already done.
      every: seconds between plain lines.
    """

    def __init__(self, description: str, total: int, done: int = 0, *, every: float = 5.0):
        self._description, self._total, self._every = description, total, every
        # The rate counts from the first step seen: the one before it compiled.
        self._first, self._started, self._last_line = done, None, -math.inf
        self._bar = None
        if Console().is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[rate]:.1f} steps/s"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._task = self._bar.add_task(
                description, total=total, completed=done, rate=0.0, text=""
            )

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows that `step` is done."""
        now = time.monotonic()
        if self._started is None:
            self._first, self._started = step, now
        rate = (step - self._first) / max(now - self._started, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=rate, text=text)
        elif now - self._last_line >= self._every or step == self._total:
            self._last_line = now
            pace = f"  {rate:.1f} steps/s  {(self._total - step) / rate:.0f} s left" if rate else ""
            print(f"{self._description}: step {step}/{self._total}  {text}{pace}", flush=True)
