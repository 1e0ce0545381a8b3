"""Starts the processes of a run, watches them, and starts them again after a fault."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from jaxmodels.training import processes

# Exit status of a fault that may pass by itself, EX_TEMPFAIL of <sysexits.h>: a lost peer,
# a hung step. A process killed by a signal is such a fault too; any other status is not,
# because the same command would end in the same way.
TEMPORARY = 75

# Others than the one that failed have so long to say what they saw.
_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.05

# Asks the kernel to be killed when the launcher dies, whose number comes first, and becomes
# the command: 1 is PR_SET_PDEATHSIG of <sys/prctl.h>. A program of its own, because what
# `preexec_fn` runs in a copy of a process with threads may never return.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def supervise(
    command: Sequence[str],
    *,
    processes_count: int = 1,
    restarts: int = 0,
    stop_seconds: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs a command until it ends, in one process or several that train together.

    When one process fails the others are ended, since they would wait for it for
    ever, and all start again, if the fault may pass. Every run starts from the last
    whole checkpoint, which is the command's own concern.

    Args:
      command: program and arguments, the same for every process.
      processes_count: how many to start.
      restarts: how many times to start again.
      stop_seconds: after SIGTERM or SIGINT, which are handed on, processes have so
        long to save before they are killed.
      environment: of the processes; by default this one's.

    Returns:
      The exit status: 0, that of the process that failed, or 128 + number of the
      signal that ended it.

    Raises:
      ValueError: a count out of its range.
    """
    if processes_count < 1 or restarts < 0:
        raise ValueError(
            f"supervise: processes_count={processes_count} must be positive and "
            f"restarts={restarts} not negative"
        )
    environment = dict(os.environ if environment is None else environment)
    with _Stop() as stop:
        for attempt in range(restarts + 1):
            group = _start(command, processes_count, environment)
            began = time.monotonic()
            status, cause = _watch(group, stop, stop_seconds)
            if status == 0 or not _may_pass(status) or stop.number or attempt == restarts:
                if status and cause:
                    _say(cause)
                return 128 - status if status < 0 else status
            seconds = time.monotonic() - began
            _say(f"{cause} after {seconds:.0f} s; restart {attempt + 1} of {restarts}")
    raise AssertionError("the last attempt returns")


class _Stop:
    """Notes SIGTERM and SIGINT instead of dying of them."""

    def __init__(self):
        self.number = 0

    def __enter__(self):
        def note(number, frame):
            self.number = number

        self._before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _start(command, count, environment) -> list[subprocess.Popen]:
    if sys.platform == "linux":
        wrapper = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        command = [*wrapper, *command]
    if count > 1:
        address = f"127.0.0.1:{_free_port()}"
        environment = {**environment, "JAX_COORDINATOR_ADDRESS": address}
        environment[processes.COUNT] = str(count)
    group = []
    for index in range(count):
        if count > 1:
            environment = {**environment, processes.INDEX: str(index)}
        # In sessions of their own, or the terminal's Ctrl-C would reach them twice.
        group.append(subprocess.Popen(command, env=environment, start_new_session=True))
    return group


def _watch(group, stop, stop_seconds) -> tuple[int, str]:
    """Waits until all have ended or one has failed; returns the status and its cause."""
    deadline = None
    while any(process.poll() is None for process in group):
        failed = [i for i, process in enumerate(group) if process.poll()]
        if failed:
            return _verdict(group, failed[0])
        if stop.number and deadline is None:
            deadline = time.monotonic() + stop_seconds
            for process in group:
                process.send_signal(stop.number if len(group) == 1 else signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _say(f"not ended {stop_seconds:.0f} s after the signal; killed")
            _kill(group)
        time.sleep(_POLL_SECONDS)
    return _verdict(group, next((i for i, p in enumerate(group) if p.returncode), 0))


def _verdict(group, first: int) -> tuple[int, str]:
    """Ends all; returns the status and its cause.

    The others fail for want of the one that was at fault, in any way, and it need not
    be the first that is seen. A signal from outside is never a consequence; SIGABRT is,
    as JAX ends a process by it whose peer is lost.
    """
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(p.poll() is None for p in group):
        time.sleep(_POLL_SECONDS)
    ended = {i: p.returncode for i, p in enumerate(group) if p.returncode is not None}
    _kill(group)
    killed = [i for i, status in ended.items() if status < 0 and -status != signal.SIGABRT]
    lasting = [i for i, status in ended.items() if status and not _may_pass(status)]
    index = next(iter(killed + lasting), first)
    return ended[index], _cause(ended[index], index, len(group))


def _cause(status: int, index: int, count: int) -> str:
    """Of a wrong input the process itself has spoken."""
    who = f"process {index}" if count > 1 else "the process"
    if status < 0:
        return f"{who} was ended by {signal.Signals(-status).name}"
    return f"{who} ended with status {status}" if status == TEMPORARY or count > 1 else ""


def _may_pass(status: int) -> bool:
    return status < 0 or status == TEMPORARY


def _kill(group) -> None:
    """Checkpoints survive it, by design."""
    for process in group:
        if process.poll() is None:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _say(text: str) -> None:
    print(f"jaxmodels.launch: {text}", file=sys.stderr, flush=True)
