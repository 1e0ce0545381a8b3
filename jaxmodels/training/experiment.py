"""From a configuration to a folder of results: what every experiment script shares."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import tyro

from jaxmodels import cpu
from jaxmodels.training.compilation import enable_compilation_cache
from jaxmodels.training.loop import describe_difference

# What a wrong input, a bad file or a full disk raises; anything else is a bug.
_EXPECTED = (ValueError, OSError, ArithmeticError)
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
    status 1, its traceback kept in the folder as `error.txt`.

    Args:
      main: takes the configuration and the run's folder.
      config_class: a frozen dataclass with a field `folder: Path | None`.
    """
    cpu.tune()
    # Orbax logs the tracebacks of failures that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    script = Path(sys.argv[0])
    config = tyro.cli(config_class, description=sys.modules["__main__"].__doc__)
    try:
        with _run_folder(config, Path("runs") / script.stem) as folder:
            _run_in(folder, main, config)
    except _EXPECTED as error:
        print(f"{script.name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def trajectory_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that determine the result, as JSON values."""
    return {k: v for k, v in _json_fields(config).items() if k not in _FREE_FIELDS}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step, so that a crash never leaves half of one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _json_fields(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _run_in(folder: Path, main: Callable[[Any, Path], Result], config: Any) -> None:
    started = time.monotonic()
    print(f"working in {folder}", flush=True)
    enable_compilation_cache()
    try:
        result = main(config, folder)
    except _EXPECTED:
        (folder / "error.txt").write_text(traceback.format_exc())
        raise
    seconds = time.monotonic() - started
    report = {**dataclasses.asdict(result), "seconds": round(seconds, 1), **_surroundings()}
    write_json(folder / "result.json", report)
    for name, value in result.measured.items():
        print(f"  {name:<40} {value:.4g}" if isinstance(value, float) else f"  {name:<40} {value}")
    print(f"{'The claim holds' if result.holds else 'The claim does not hold'}: {result.claim}")
    print(f"{seconds:.0f} s; everything is in {folder}", flush=True)


@contextlib.contextmanager
def _run_folder(config: Any, parent: Path) -> Iterator[Path]:
    """Finds or makes the folder and keeps every other process out of it."""
    if config.folder is not None:
        candidates = [config.folder]
    else:
        unfinished = [p for p in parent.glob("*") if not (p / "result.json").exists()]
        candidates = [p for p in sorted(unfinished, reverse=True) if not _difference(p, config)]
        candidates.append(parent / time.strftime("%Y-%m-%d_%H-%M-%S"))
    for folder in candidates:
        folder.mkdir(parents=True, exist_ok=True)
        # The kernel releases it however the process ends.
        lock = filelock.FileLock(folder / ".lock")
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        with held:
            if difference := _difference(folder, config):
                raise ValueError(
                    f"run: {folder} holds a run of another configuration ({difference}); use "
                    "those values, or another folder"
                )
            write_json(folder / "config.json", _json_fields(config))
            yield folder
        return
    raise ValueError(f"run: another process is working in {candidates[-1]}; wait, or use --folder")


def _difference(folder: Path, config: Any) -> str:
    """Says in which fields the run in a folder differs from a configuration; empty if in none."""
    saved = folder / "config.json"
    if not saved.is_file():
        return ""
    there, now = json.loads(saved.read_text()), trajectory_fields(config)
    names = sorted({*there, *now} - _FREE_FIELDS)
    return describe_difference({n: there.get(n) for n in names}, now, "there")


def _surroundings() -> dict[str, Any]:
    packages = ("jax", "flax", "optax", "numpy", "jaxmodels")
    return {
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "hardware": {
            "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {p: importlib.metadata.version(p) for p in packages}
        | {"python": platform.python_version()},
    }
