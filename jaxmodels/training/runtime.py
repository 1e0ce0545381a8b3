"""How a run is to behave, whatever it computes: flags that every experiment has."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What to do about faults, and what to report; none of it changes an undisturbed result."""

    restarts: int = 0
    """How often a run that was killed, lost a peer or hung is started again, from its last
    checkpoint."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is not finite: stop, leave that update out, or go back to the
    last checkpoint and pass over the batch."""
    stall_seconds: float = 600.0
    """A step that takes longer is taken for hung, and the run ends with status 75."""
    profile: bool = False
    """Write a trace of a few steps, for XProf or Perfetto, into the run's folder."""

    def __post_init__(self):
        if self.restarts < 0 or self.stall_seconds <= 0:
            raise ValueError(
                f"Runtime: restarts={self.restarts} must not be negative and "
                f"stall_seconds={self.stall_seconds} must be positive"
            )


_CURRENT = contextvars.ContextVar("runtime", default=Runtime())  # noqa: B039 (it is frozen)


def current_runtime() -> Runtime:
    """What the command line asked for; the defaults outside of an experiment."""
    return _CURRENT.get()


@contextlib.contextmanager
def using(runtime: Runtime) -> Iterator[None]:
    """Makes it the current one inside a `with`."""
    token = _CURRENT.set(runtime)
    try:
        yield
    finally:
        _CURRENT.reset(token)
