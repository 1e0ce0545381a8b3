"""A training run small enough to be killed many times in a test, as an experiment is written."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import training
from jaxmodels.training import processes
from jaxmodels.training.experiment import Result, run, trajectory_fields


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 30
    batch_size: int = 16
    mesh: str = ""
    checkpoint_every: int = 5
    log_every: int = 1
    fault: str = ""
    """What goes wrong, once: "kill:11:1" is SIGKILL to process 1 in step 11; also stop, term,
    hang (in the input), nan, gone (a file)."""
    folder: Path | None = None


class Stream:
    """Batch n is a function of n; every process reads its own part of it."""

    def __init__(self, config, folder):
        self.position, self.config, self.folder = 0, config, folder
        self.resumed = False

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        rng = np.random.default_rng(self.position)
        x = rng.normal(size=(self.config.batch_size, 5)).astype(np.float32)
        y = x[:, :3] * x[:, 2:]
        self._fault(y)
        # Side by side the parts are the batch of one process, in its order.
        part = np.split(np.arange(len(x)), jax.process_count())[processes.index()]
        return {"x": x[part], "y": y[part]}

    def _fault(self, y):
        if not self.config.fault:
            return
        kind, step, index = self.config.fault.split(":")
        if kind == "term" and self.position > int(step) and not self.resumed:
            time.sleep(0.5)  # or training would be over before all have heard of it
        if self.position != int(step):
            return
        if kind == "nan":
            y[1, 2] = np.nan
        done = self.folder / "fault"
        if processes.index() != int(index) or done.exists():
            return
        done.touch()
        if kind == "hang":
            time.sleep(3600)
        if kind == "gone":
            (self.folder / "not there").read_bytes()
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
        if kind in signals:
            os.kill(os.getpid(), signals[kind])

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position, self.resumed = state["position"], True


def main(config, folder):
    model, optimizer = nn.Dense(3), training.adamw(1e-2, steps=config.steps)
    mesh = training.make_mesh(config.mesh)

    def loss_fn(params, batch, key):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        return jnp.mean((model.apply({"params": params}, x) - batch["y"]) ** 2), {}

    example = {"inputs": jnp.zeros((1, 5))}
    state = training.init_state(model, optimizer, jax.random.key(0), example, mesh=mesh)
    state = training.fit(
        state,
        training.make_step(loss_fn, optimizer),
        Stream(config, folder),
        steps=config.steps,
        directory=folder,
        config={k: v for k, v in trajectory_fields(config).items() if k != "fault"},
        mesh=mesh,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
    )
    params = processes.to_host(state.params)
    processes.first_goes_on()
    np.savez(folder / "params.npz", **params)
    return Result("it trains", "none", True, {"total": float(params["kernel"].sum())})


if __name__ == "__main__":
    run(main, Config)
