"""From a configuration to a folder of results: what every experiment script shares."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import filelock
import jax
import tyro

from jaxmodels import cpu
from jaxmodels.training import processes
from jaxmodels.training.compilation import enable_compilation_cache
from jaxmodels.training.files import write_json
from jaxmodels.training.loop import describe_difference
from jaxmodels.training.runtime import Runtime, using
from jaxmodels.training.supervisor import TEMPORARY, supervise

# What a wrong input, a bad file or a full disk raises; anything else is a bug.
_EXPECTED = (ValueError, OSError, ArithmeticError)
_STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL): ")
# Fields that say where or how often, not what: a resumed run may change them.
_FREE_FIELDS = {"folder", "mesh", "checkpoint_every", "log_every", "num_workers"}


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
      claim: the paper's statement, with its table or figure.
      source: the paper.
      holds: whether the claim holds at this scale.
      measured: numbers by name.
    """

    claim: str
    source: str
    holds: bool
    measured: dict[str, Any]


def run(main: Callable[[Any, Path], Result], config_class: type) -> None:
    """Parses the command line, runs `main` in its folder and writes `result.json`.

    The folder is `runs/<experiment>/<time>/`, or the configuration's `folder`.
    An unfinished run of the same configuration is gone on with; a finished
    one is left alone. A problem the user can mend ends with one message and
    status 1, its traceback kept in the folder as `error.txt`; a lost or hung peer
    with status 75. Where the environment speaks of several processes (see
    `processes.start`) all of them run `main`, and the first one writes.

    Args:
      main: takes the configuration and the run's folder.
      config_class: a frozen dataclass with a field `folder: Path | None`. The command
        line has its fields and those of `Runtime`.
    """
    cpu.tune()
    # Orbax logs the tracebacks of failures that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    script = Path(sys.argv[0])
    config, runtime = _command_line(config_class)
    if runtime.restarts:
        raise SystemExit(_supervised(script.name, runtime.restarts))
    try:
        processes.start()
        _require_same(config)
        with using(runtime), _run_folder(config, Path("runs") / script.stem) as folder:
            _run_in(folder, main, config)
    except processes.Follower:
        pass
    except SystemExit as stop:
        _fail("", stop.code)
    except Exception as error:
        if _lost_peer(error):
            _fail(f"{script.name}: a peer is lost ({_first_line(error)})", TEMPORARY)
        if isinstance(error, _EXPECTED):
            _fail(f"{script.name}: {error}", 1)
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        _fail("", 1)


def _lost_peer(error: BaseException | None) -> bool:
    """Whether a compiled program failed for want of a peer, also where that was wrapped.

    JAX raises it as a JaxRuntimeError or a ValueError, with gRPC's name of the status.
    """
    if error is None or jax.process_count() == 1:
        return False
    told = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
    return bool(told) or _lost_peer(error.__cause__ or error.__context__)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _command_line(config_class: type) -> tuple[Any, Runtime]:
    """The configuration and the flags that every experiment has."""
    fields = [
        ("config", Annotated[config_class, tyro.conf.arg(name="")]),
        ("runtime", Annotated[Runtime, tyro.conf.arg(name="")], Runtime()),
    ]
    command = dataclasses.make_dataclass("Command", fields, frozen=True)
    try:
        parsed = tyro.cli(command, description=sys.modules["__main__"].__doc__)
    except ValueError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    return parsed.config, parsed.runtime


def _supervised(name: str, restarts: int) -> int:
    """Runs this command in a process of its own, again after a fault."""
    if processes.COUNT in os.environ:
        print(f"{name}: give --restarts to jaxmodels.launch, before the script", file=sys.stderr)
        return 2
    arguments = [*sys.argv, "--restarts", "0"]  # the last one counts
    return supervise([sys.executable, *arguments], restarts=restarts)


def _fail(message: str, status: int) -> NoReturn:
    """Ends this process, also where others wait for it and it would wait for them."""
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    if message:
        print(f"{who}{message}", file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        # At a normal end JAX waits for its peers, which may never come.
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status) from None


def _require_same(config: Any) -> None:
    fields = processes.gather(trajectory_fields(config))
    for number, other in enumerate(fields[1:], 1):
        if difference := describe_difference(fields[0], other, "process 0"):
            difference = difference.replace("now", f"process {number}")
            raise ValueError(
                f"run: processes were started with different configurations ({difference}); "
                "start all with the same command"
            )


def trajectory_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that determine the result, as JSON values."""
    return {k: v for k, v in _json_fields(config).items() if k not in _FREE_FIELDS}


def _json_fields(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _run_in(folder: Path, main: Callable[[Any, Path], Result], config: Any) -> None:
    started = time.monotonic()
    _say(f"working in {folder}")
    enable_compilation_cache()
    try:
        result = main(config, folder)
    except _EXPECTED:
        if processes.is_first():
            (folder / "error.txt").write_text(traceback.format_exc())
        raise
    if not processes.is_first():
        return
    seconds = time.monotonic() - started
    report = {**dataclasses.asdict(result), "seconds": round(seconds, 1), **_surroundings(folder)}
    write_json(folder / "result.json", report)
    for name, value in result.measured.items():
        _say(f"  {name:<40} {value:.4g}" if isinstance(value, float) else f"  {name:<40} {value}")
    _say(f"{'The claim holds' if result.holds else 'The claim does not hold'}: {result.claim}")
    _say(f"{seconds:.0f} s; everything is in {folder}")


def _say(text: str) -> None:
    if processes.is_first():
        print(text, flush=True)


@contextlib.contextmanager
def _run_folder(config: Any, parent: Path) -> Iterator[Path]:
    """The first process finds or makes the folder and keeps every other run out of it."""
    if not processes.is_first():
        found = processes.gather(None)[0]
        if "error" in found:
            raise SystemExit(1)
        yield Path(found["folder"])
        return
    try:
        lock, folder = _locked_folder(config, parent)
    except Exception as error:
        processes.gather({"error": str(error)})
        raise
    with lock:
        processes.gather({"folder": str(folder)})
        yield folder


def _locked_folder(config: Any, parent: Path) -> tuple[Any, Path]:
    if config.folder is not None:
        candidates = [config.folder]
    else:
        unfinished = [p for p in parent.glob("*") if not (p / "result.json").exists()]
        candidates = [p for p in sorted(unfinished, reverse=True) if not _difference(p, config)]
        candidates.append(parent / time.strftime("%Y-%m-%d_%H-%M-%S"))
    for folder in candidates:
        owner = folder / ".owner"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The kernel releases it however the process ends, so none is ever stale.
            lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
        except filelock.Timeout:
            continue
        except OSError as error:
            raise OSError(
                f"run: cannot write in {folder} ({error.strerror}); choose another with --folder"
            ) from error
        if difference := _difference(folder, config):
            raise ValueError(
                f"run: {folder} holds a run of another configuration ({difference}); use "
                "those values, or another folder"
            )
        owner.write_text(f"process {os.getpid()} on {platform.node()}")
        write_json(folder / "config.json", _json_fields(config))
        return lock, folder
    who = owner.read_text() if owner.is_file() else "another process"
    raise ValueError(f"run: {who} is working in {candidates[-1]}; wait, or use --folder")


def _difference(folder: Path, config: Any) -> str:
    """Says in which fields the run in a folder differs from a configuration; empty if in none."""
    saved = folder / "config.json"
    if not saved.is_file():
        return ""
    there, now = json.loads(saved.read_text()), trajectory_fields(config)
    names = sorted({*there, *now} - _FREE_FIELDS)
    return describe_difference({n: there.get(n) for n in names}, now, "there")


def _surroundings(folder: Path) -> dict[str, Any]:
    packages = ("jax", "flax", "optax", "numpy", "jaxmodels")
    timings = sorted(folder.rglob("timing.json"))
    return {
        "timing": {str(p.parent.relative_to(folder)): json.loads(p.read_text()) for p in timings},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "hardware": {
            "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {p: importlib.metadata.version(p) for p in packages}
        | {"python": platform.python_version()},
    }
