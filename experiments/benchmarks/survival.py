"""Kills the main job again and again, and compares what it ends with, bit for bit.

Measured  Every array of the final checkpoints (parameters, optimizer, moving
          average, key) of a run that is killed with SIGKILL at random moments and
          restarted each time, against those of an undisturbed run; and the time
          that the interruptions cost.
Run       python experiments/benchmarks/survival.py            (about 10 min on 2 CPU cores)
          python experiments/benchmarks/survival.py --kills 3 --steps 100
"""

import dataclasses
import random
import shutil
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
    kills: int = 10
    steps: int = 500
    seed: int = 0
    folder: Path = Path("runs/survival")


def main(config: Config) -> None:
    shutil.rmtree(config.folder, ignore_errors=True)
    undisturbed, killed = config.folder / "undisturbed", config.folder / "killed"
    seconds = run(config, undisturbed)
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    started, moments, kills = time.monotonic(), random.Random(config.seed), 0
    # Lives are a tenth of a run on average (for ten kills), so the last ones come near its end.
    while kills < config.kills and not (killed / "result.json").exists():
        moment = moments.uniform(0, 2 / config.kills) * seconds
        if run(config, killed, kill_after=moment) >= moment:
            kills += 1
            print(f"kill {kills} after {moment:.1f} s, checkpoints at {newest(killed)}", flush=True)
    run(config, killed)
    print(f"killed {kills} times: {time.monotonic() - started:.0f} s in all")
    same = bits(undisturbed) == bits(killed)
    print(f"{len(bits(killed))} final arrays are {'bit-identical' if same else 'DIFFERENT'}")
    raise SystemExit(not same)


def run(config: Config, folder: Path, kill_after: float | None = None) -> float:
    """Runs the main job in a folder until it ends or is killed; returns the seconds it lived."""
    started = time.monotonic()
    command = [sys.executable, SCRIPT, "--steps", str(config.steps), "--folder", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if status := process.wait(kill_after):
            raise SystemExit(f"{SCRIPT.name} ended with status {status}")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return time.monotonic() - started


def newest(folder: Path) -> dict[str, int]:
    """The last checkpoint of each training run in a folder."""
    steps = {
        path.parent.name: [int(p.name) for p in path.iterdir() if p.name.isdigit()]
        for path in sorted(folder.glob("*/checkpoints"))
    }
    return {name: max(found, default=0) for name, found in steps.items()}


def bits(folder: Path) -> dict[str, bytes]:
    """Every array of the last checkpoints, as bytes."""
    found = {}
    for name, step in newest(folder).items():
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore((folder / name / "checkpoints" / str(step) / "state").resolve())
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            numbers = jax.random.key_data(leaf) if is_key else leaf
            found[f"{name}{jax.tree_util.keystr(path)}"] = np.asarray(numbers).tobytes()
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
