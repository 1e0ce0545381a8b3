"""One way to spread training over devices, measured in a process that has so many."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from jaxmodels import training
from jaxmodels.models.language.llama import Llama
from jaxmodels.models.language.mixtral import Mixtral
from jaxmodels.training.communication import bytes_sent


def measure_in_processes(devices: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`measure` of every case, in a new process that sees so many virtual devices.

    Args:
      devices: how many; a process cannot change it once it has any.
      cases: arguments of `measure`.

    Raises:
      RuntimeError: the process failed; with what it wrote.
    """
    flags = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring on {devices} devices failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(mesh: str, sizes: dict[str, int], batch: list[int], steps: int) -> dict[str, Any]:
    """Trains on random tokens; what lies on a device, what it sends and how fast it is.

    Args:
      mesh: as `training.make_mesh` takes it.
      sizes: fields of the decoder, which has experts if they say how many.
      batch: sequences and their length.
      steps: how many are timed, after one that is not.

    Returns:
      "parameters": bytes of all; "state": bytes of parameters and optimizer on one
      device; "working": bytes beside them while a step runs; "sent": bytes that a
      device sends in a step, by kind; "tokens_per_second", in the median step;
      "losses" of all steps.
    """
    model = (Mixtral if "num_experts" in sizes else Llama)(**sizes)
    place = training.make_mesh(mesh)
    tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], batch)
    examples = training.shard_batch({"tokens": tokens, "targets": np.roll(tokens, -1, 1)}, place)
    optimizer = training.adamw(1e-3, steps=steps + 1, warmup=0)
    inputs = {"tokens": tokens[:1]}
    state = training.init_state(model, optimizer, jax.random.key(0), inputs, mesh=place)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    # So that attention and experts know which mesh they are for.
    with jax.set_mesh(place):
        step = training.make_step(model.loss, optimizer).lower(state, examples).compile()
    losses, times = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, metrics = step(state, examples)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - begin)
    return {
        "parameters": parameters,
        "state": sum(
            leaf.addressable_shards[0].data.nbytes
            for leaf in jax.tree.leaves((state.params, state.opt_state))
        ),
        "working": step.memory_analysis().temp_size_in_bytes,
        "sent": bytes_sent(step.as_text()),
        "tokens_per_second": tokens.size / float(np.median(times[1:])),
        "losses": losses,
    }


if __name__ == "__main__":
    print(json.dumps([measure(**case) for case in json.loads(sys.argv[1])]))
