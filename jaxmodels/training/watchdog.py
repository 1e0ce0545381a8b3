"""Ends a process that makes no progress, which no exception would do."""

import os
import sys
import threading
import time

from jaxmodels.training.supervisor import TEMPORARY

# The first step compiles, which takes as long as it takes.
_PATIENCE_AT_FIRST = 10


class Watchdog:
    """A thread that ends the process when `beat` has not been called for too long.

    A peer that is stopped, or a reader that waits for a file system, leaves this
    process waiting inside a compiled program or a system call, where no Python
    code could end it. The exit status is that of a temporary fault.

    Args:
      seconds: longest time between two beats; ten times as long before the second.
      description: of what hangs, for the message.
    """

    def __init__(self, seconds: float, description: str):
        self._seconds, self._description = seconds, description
        self._beats, self._step, self._last = 0, 0, time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """Says that a step has ended."""
        self._beats, self._step, self._last = self._beats + 1, step, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 1.0)):
            allowed = self._seconds * (1 if self._beats > 1 else _PATIENCE_AT_FIRST)
            if time.monotonic() - self._last > allowed:
                print(self._message(allowed), file=sys.stderr, flush=True)
                # Neither exceptions nor exit handlers reach a thread that waits in C.
                os._exit(TEMPORARY)

    def _message(self, seconds: float) -> str:
        return (
            f"{self._description}: no progress for {seconds:.0f} s after step {self._step}, a peer "
            "or the input hangs; stopped, and the same command goes on from the last checkpoint"
        )
