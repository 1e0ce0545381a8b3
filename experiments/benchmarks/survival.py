"""Kills the main job again and again, and compares what it ends with, bit for bit.

Measured  Every array of the final checkpoints (parameters, optimizer, moving
          average, key) and every record of the loss curves, of runs whose processes
          are killed with SIGKILL at random moments and started again by the
          supervisor, against those of an undisturbed run; alone and as two processes
          that train together, of which one is killed.
Asked     50 of 50 end with the same bits.
Run       python experiments/benchmarks/survival.py            (about 20 min on 2 CPU cores)
          python experiments/benchmarks/survival.py --kills 3 --processes 1
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro

SCRIPT = Path(__file__).parents[1] / "rectified_flow_dit.py"


@dataclasses.dataclass(frozen=True)
class Config:
    kills: int = 25
    """Of each number of processes."""
    processes: tuple[int, ...] = (1, 2)
    steps: int = 150
    longest_life: float = 25.0
    """Seconds; each life lasts a random part of it, from starting Python on."""
    seed: int = 0
    folder: Path = Path("runs/survival")


def main(config: Config) -> None:
    shutil.rmtree(config.folder, ignore_errors=True)
    moments = random.Random(config.seed)
    failed = 0
    for count in config.processes:
        undisturbed = config.folder / f"{count}" / "undisturbed"
        started = time.monotonic()
        if wait(launched(config, count, undisturbed)):
            raise SystemExit("the undisturbed run failed")
        seconds = time.monotonic() - started
        print(f"{count} processes, undisturbed: {seconds:.0f} s", flush=True)
        kills, runs = 0, 0
        while kills < config.kills:
            folder = config.folder / f"{count}" / f"killed_{runs}"
            done = kill_in(config, count, folder, config.kills - kills, moments)
            same = bits(undisturbed) == bits(folder) and curves(undisturbed) == curves(folder)
            print(f"{count} processes, killed {done} times: {'same' if same else 'DIFFERENT'}")
            failed += 0 if same else done
            kills, runs = kills + done, runs + 1
    total = config.kills * len(config.processes)
    print(f"{total - failed} of {total} kills ended bit-identical to the undisturbed run")
    raise SystemExit(bool(failed))


def launched(config: Config, count: int, folder: Path, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxmodels.launch", "-n", count, "--restarts", restarts]
    # Training is what is to survive; the judging after it is cut short.
    options = ["--steps", config.steps, "--folder", folder, "--sampling-steps", 1]
    log = config.folder / f"log_{count}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            list(map(str, [*command, SCRIPT, *options])), stdout=file, stderr=file
        )


def wait(process: subprocess.Popen, seconds: float | None = None) -> int | None:
    """The exit status, or None if it has not ended in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def kill_in(config: Config, count: int, folder: Path, most: int, moments: random.Random) -> int:
    """Runs once, kills one of its processes up to `most` times, and says how often it did."""
    process, kills = launched(config, count, folder, restarts=most), 0
    while kills < most and wait(process, moments.uniform(0, config.longest_life)) is None:
        if alive := children(process.pid):
            os.kill(moments.choice(alive), signal.SIGKILL)
            kills += 1
            print(f"kill {kills} with checkpoints at {newest(folder)}", flush=True)
    if status := wait(process):
        raise SystemExit(f"{SCRIPT.name} ended with status {status}")
    return kills


def children(number: int) -> list[int]:
    """Of the launcher; a run that is just being started again has none."""
    text = Path(f"/proc/{number}/task/{number}/children").read_text()
    return [int(child) for child in text.split()]


def newest(folder: Path) -> dict[str, int]:
    """The last checkpoint of each training run in a folder."""
    steps = {
        path.parent.name: [int(p.name) for p in path.iterdir() if p.name.isdigit()]
        for path in sorted(folder.glob("*/checkpoints"))
    }
    return {name: max(found, default=0) for name, found in steps.items()}


def curves(folder: Path) -> dict[str, str]:
    """The records of each training run."""
    return {p.parent.name: p.read_text() for p in sorted(folder.glob("*/metrics.jsonl"))}


def bits(folder: Path) -> dict[str, bytes]:
    """Every array of the last checkpoints, as bytes, whatever devices wrote them."""
    found, reader = {}, ocp.PyTreeCheckpointer()
    for name, step in newest(folder).items():
        path = (folder / name / "checkpoints" / str(step) / "state").resolve()
        leaves = reader.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
        for place, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            numbers = jax.random.key_data(leaf) if is_key else leaf
            found[f"{name}{jax.tree_util.keystr(place)}"] = np.asarray(numbers).tobytes()
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
