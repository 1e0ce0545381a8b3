"""How fast is a DiT-S/2 here, and how soon does it train?

Measured  32 x 32 x 4 latents, batch 8, float32, the network of `jaxmodels` and the
          same in `diffusers` on torch, eager and compiled, with equal parameters:
          a training step (forward, backward, AdamW on the mean squared error of
          the velocity) and a sampling step (forward, one Euler step). Then the
          time from the start of a process to the end of its first training step,
          with an empty and with a filled compilation cache.
Run       python experiments/benchmarks/dit.py            (about 3 min on 2 CPU cores)
          python experiments/benchmarks/dit.py --help
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from _timing import Contest, print_ratios

BATCH, SIZE, CHANNELS, CLASSES = 8, 32, 4, 1000
THREADS = 2
LEARNING_RATE, DECAY = 1e-4, 0.01


def example() -> tuple[np.ndarray, ...]:
    """Latents on the path, their times, classes and velocities."""
    rng = np.random.default_rng(0)
    data, noise = rng.normal(size=(2, BATCH, SIZE, SIZE, CHANNELS)).astype(np.float32)
    t = rng.uniform(0, 1, BATCH).astype(np.float32)
    s = t[:, None, None, None]
    return (1 - s) * data + s * noise, 1000 * t, rng.integers(0, CLASSES, BATCH), noise - data


def _jaxmodels(case: str, devices: int) -> Callable[[], None]:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import optax

    from jaxmodels import create_model, training
    from jaxmodels.ops import flow

    model = create_model("dit_s_2", out_channels=None)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    mesh = training.make_mesh(f"data={devices}")
    x, t, labels, velocity = training.shard_batch(example(), mesh)
    inputs = {"x": x, "timesteps": t, "labels": labels}
    state = training.init_state(model, optimizer, jax.random.key(0), inputs, mesh=mesh)
    if case == "sampling step":
        sample = jax.jit(lambda p, x: x + model.apply({"params": p}, x, t, labels) / 16)
        return lambda: sample(state.params, x).block_until_ready()

    def loss_fn(params, batch, key):
        inputs, velocity = batch
        out = model.apply({"params": params}, **inputs, train=True, rngs={"dropout": key})
        return flow.flow_matching_loss(out, velocity).mean(), {}

    step = training.make_step(loss_fn, optimizer)

    def call():
        nonlocal state
        state, metrics = step(state, (inputs, velocity))
        jax.block_until_ready((state, metrics))

    return call


def ours(case: str) -> Callable[[], None]:
    """jaxmodels on one device that uses all cores."""
    return _jaxmodels(case, devices=1)


def ours_per_core(case: str) -> Callable[[], None]:
    """jaxmodels on a device for each core, the batch split between them."""
    return _jaxmodels(case, devices=THREADS)


def _diffusers(case: str, compiled: bool) -> Callable[[], None]:
    import torch
    from diffusers import DiTTransformer2DModel

    torch.set_num_threads(THREADS)
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=12, num_embeds_ada_norm=CLASSES
    )
    for block in model.transformer_blocks:  # as published, and as ours: one for all blocks
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    x, t, labels, velocity = (torch.tensor(a) for a in example())
    x, velocity = (a.permute(0, 3, 1, 2).contiguous() for a in (x, velocity))
    network = torch.compile(model) if compiled else model
    if case == "sampling step":
        model.eval()

        def call():
            with torch.inference_mode():
                x + network(x, t, labels).sample / 16

        return call
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True
    )

    def call():
        optimizer.zero_grad(set_to_none=True)
        (network(x, t, labels).sample - velocity).square().mean().backward()
        optimizer.step()

    return call


def torch_eager(case: str) -> Callable[[], None]:
    """diffusers as it is."""
    return _diffusers(case, compiled=False)


def torch_compiled(case: str) -> Callable[[], None]:
    """diffusers through torch.compile."""
    return _diffusers(case, compiled=True)


def seconds_to_first_step(cache: Path) -> float:
    """Starts a Python process that does one training step and ends; returns how long it took."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    code = "import dit; dit.ours('training step')()"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parent
    )
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 5
    """Turns of each contender."""
    compile: bool = True
    """Also measure torch.compile."""
    speed: bool = True
    """Measure steps, not only the time to the first one."""


def main(config: Config) -> None:
    if config.speed:
        contenders = {
            "jaxmodels": ours,
            "jaxmodels, a device per core": ours_per_core,
            "torch eager": torch_eager,
        }
        if config.compile:
            contenders["torch compiled"] = torch_compiled
        with Contest(contenders) as contest:
            results = {
                case: contest.compare(case, rounds=config.rounds, turn_seconds=2)
                for case in ("training step", "sampling step")
            }
        print_ratios(
            f"DiT-S/2, batch {BATCH}, float32, {THREADS} threads", results, ours="jaxmodels"
        )
    with tempfile.TemporaryDirectory() as cache:
        cold, *warm = (seconds_to_first_step(Path(cache)) for _ in range(3))
    warm = ", ".join(f"{seconds:.1f}" for seconds in warm)
    print(f"process start to end of first training step: cold {cold:.1f} s; warm {warm} s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
