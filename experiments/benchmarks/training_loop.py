"""What the training loop costs beside the step itself, and what a checkpoint costs the loop.

Measured  Steps of about 20 ms run bare (the jitted step on one batch after the other)
          and by `training.fit` with its reader, metrics, watchdog and progress, in turn;
          and a state of 1 GB saved while steps go on: how long training stands still,
          over how long the checkpoint takes to write.
Asked     `fit` costs at most 2 %; training stands still at most 10 % of the time to write.
Run       python experiments/benchmarks/training_loop.py         (about 2 min on 2 CPU cores)
"""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxmodels import cpu, training


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 200
    rounds: int = 5
    width: int = 1024
    """Of the model's layers: 1024 gives steps of about 20 ms."""
    gigabytes: float = 1.0
    """Of the state that is saved."""
    folder: Path | None = None
    """Where checkpoints are written; by default a temporary folder."""


class Stream:
    """One batch again and again, from memory, so that only the loop is measured."""

    def __init__(self, batch):
        self._batch = batch

    def __next__(self):
        return self._batch

    def get_state(self):
        return {}

    def set_state(self, state):
        del state


class Model(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.gelu(nn.Dense(self.width)(x))
        return x


def main(config: Config) -> None:
    cpu.tune()
    loop(config)
    checkpoint(config)


def loop(config: Config) -> None:
    model, optimizer = Model(config.width), training.adamw(1e-4, steps=10**6)
    batch = {"x": np.random.default_rng(0).normal(size=(256, config.width)).astype(np.float32)}

    def loss_fn(params, batch, key):
        return jnp.mean(model.apply({"params": params}, batch["x"]) ** 2), {}

    step = training.make_step(loss_fn, optimizer)

    def fresh():
        return training.init_state(model, optimizer, jax.random.key(0), {"x": batch["x"]})

    def bare() -> float:
        state, _ = step(fresh(), batch)
        jax.block_until_ready(state.params)
        started = time.perf_counter()
        for _ in range(config.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - started) / config.steps

    def fitted() -> float:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            times = []

            def timed(state, batch):
                times.append(time.perf_counter())
                return step(state, batch)

            options = {"steps": config.steps + 1, "directory": folder}
            training.fit(fresh(), timed, Stream(batch), checkpoint_every=10**9, **options)
        # From step to step; the last one is followed by the last checkpoint.
        return (times[-1] - times[1]) / (len(times) - 2)

    bare(), fitted()
    ratios, seconds = [], []
    for _ in range(config.rounds):
        one, other = bare(), fitted()
        ratios.append(other / one)
        seconds.append(one)
    print(f"bare step {1e3 * statistics.median(seconds):.2f} ms")
    print(
        f"fit over bare step {statistics.median(ratios):.4f} "
        f"({min(ratios):.4f} to {max(ratios):.4f}); asked at most 1.02"
    )


def checkpoint(config: Config) -> None:
    """The next step takes the state's memory, so it cannot begin before the state is safe."""
    size = int(config.gigabytes * 2**30 / 4 / 16)
    step = jax.jit(lambda t: jax.tree.map(lambda x: x.at[0].add(1), t), donate_argnums=0)
    # Numbers that do not compress, as those of training.
    parts = jax.random.split(jax.random.key(0), 16)
    state = step({f"part_{i}": jax.random.normal(part, size) for i, part in enumerate(parts)})
    jax.block_until_ready(state)
    shares = []
    with contextlib.ExitStack() as stack:
        folder = config.folder or stack.enter_context(tempfile.TemporaryDirectory())
        checkpoints = stack.enter_context(contextlib.closing(training.Checkpointer(folder)))
        for number in range(config.rounds):
            started = time.perf_counter()
            checkpoints.save(number, state, {})
            state = jax.block_until_ready(step(state))
            stood = time.perf_counter() - started
            checkpoints.wait()
            shares.append((stood, time.perf_counter() - started))
    for stood, whole in shares:
        print(f"stood still {stood:.3f} s of {whole:.3f} s, {100 * stood / whole:.1f} %")
    print(f"median {100 * statistics.median(a / b for a, b in shares):.1f} %; asked at most 10 %")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
