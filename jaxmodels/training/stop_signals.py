"""SIGTERM and SIGINT become a wish to stop after a step, the same one in all processes."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Collects SIGTERM and SIGINT inside a `with` instead of dying; a second one is not held back.

    With several processes JAX's preemption service carries the notice from whichever
    got it to all the others, and names the step that all can stop at; SIGINT is turned
    into SIGTERM there. `processes.start` asks for that service; without it a signal
    ends the process that got it, and the last checkpoint stands.
    """

    def __init__(self):
        self._caught: list[signal.Signals] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        handled, catch = (signal.SIGTERM, signal.SIGINT), self._catch
        if jax.process_count() > 1:
            if not jax.config.jax_enable_preemption_service:
                return self
            handled, catch = (signal.SIGINT,), lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        for number in handled:
            self._before[number] = signal.signal(number, catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, step: int) -> signal.Signals | None:
        """The signal, if this is the step to stop after; every process asks at each step."""
        if jax.process_count() > 1:
            if not jax.config.jax_enable_preemption_service:
                return None
            asked = multihost_utils.reached_preemption_sync_point(step)
            return signal.SIGTERM if asked else None
        return self._caught[0] if self._caught else None

    def _catch(self, number: int, frame: object) -> None:
        self._caught.append(signal.Signals(number))
        self.__exit__()
