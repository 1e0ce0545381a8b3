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

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
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


def ours(case: str) -> Callable[[], None]:
    """jaxmodels: one jitted function with donated state."""
    from jaxmodels import cpu

    cpu.tune()
    import jax
    import jax.numpy as jnp
    import optax

    from jaxmodels import create_model

    model = create_model("dit_s_2", out_channels=None)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    x, t, labels, velocity = (jnp.asarray(a) for a in example())

    @jax.jit
    def init(key):
        params = model.init(key, x, t, labels)["params"]
        return params, optimizer.init(params), key

    def loss_fn(params, key):
        out = model.apply({"params": params}, x, t, labels, train=True, rngs={"dropout": key})
        return jnp.square(out - velocity).mean()

    def train(state):
        params, moments, key = state
        key, now = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_fn)(params, now)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments, key), loss

    def sample(params, x):
        return x + model.apply({"params": params}, x, t, labels) / 16

    state = init(jax.random.key(0))
    if case == "sampling step":
        sample = jax.jit(sample)
        return lambda: sample(state[0], x).block_until_ready()
    train = jax.jit(train, donate_argnums=0)

    def call():
        nonlocal state
        state, loss = train(state)
        jax.block_until_ready((state, loss))

    return call


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
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    start = time.perf_counter()
    command = [sys.executable, __file__, "--one-step"]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parent)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--only-start", action="store_true", help="only the time to the first step")
    parser.add_argument("--one-step", action="store_true", help="do one training step and end")
    options = parser.parse_args()
    if options.one_step:
        ours("training step")()
        return
    if not options.only_start:
        contenders = {"jaxmodels": ours, "torch eager": torch_eager}
        if not options.no_compile:
            contenders["torch compiled"] = torch_compiled
        cases = ("training step", "sampling step")
        with Contest(contenders) as contest:
            results = {
                case: contest.compare(case, rounds=options.rounds, turn_seconds=2) for case in cases
            }
        print_ratios(
            f"DiT-S/2, batch {BATCH}, float32, {THREADS} threads", results, ours="jaxmodels"
        )
    with tempfile.TemporaryDirectory() as cache:
        cold, *warm = (seconds_to_first_step(Path(cache)) for _ in range(3))
    warm = ", ".join(f"{seconds:.1f}" for seconds in warm)
    print(f"process start to end of first training step: cold {cold:.1f} s; warm {warm} s")


if __name__ == "__main__":
    main()
