"""A regression problem small enough to train in a test, and its stream of batches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import training

WIDTHS = (5, 512, 3)


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTHS[2])(nn.tanh(nn.Dense(WIDTHS[1])(x)))


class Stream:
    """Batch n is a function of n, as the pipeline's are."""

    def __init__(self, size=16, poison=None, length=None):
        self.position, self.size, self.poison, self.length = 0, size, poison, length

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self.length:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        self.position += 1
        x = rng.normal(size=(self.size, WIDTHS[0])).astype(np.float32)
        y = np.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3] - x[:, 4]], axis=1)
        if self.position == self.poison:
            y[1, 2] = np.nan
        return {"x": x, "y": y}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Problem:
    """What every test of training starts from."""

    def __init__(self):
        self.model, self.stream = Perceptron(), Stream
        self.example = {"x": jnp.zeros((1, WIDTHS[0]))}

    def loss(self, params, batch, key):
        error = self.model.apply({"params": params}, batch["x"]) - batch["y"]
        return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}

    def noisy_loss(self, params, batch, key):
        """Depends on the step's key, so that a wrong key shows in the parameters."""
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        return self.loss(params, {**batch, "x": x}, key)

    def optimizer(self, **changes):
        return training.adamw(**{"learning_rate": 1e-2, "steps": 100, "warmup": 3} | changes)

    @functools.cached_property
    def compiled(self):
        """A step with noise and a moving average, and its initial state to be copied."""
        optimizer = self.optimizer()
        step = training.make_step(self.noisy_loss, optimizer, ema=0.9)
        return step, self.state(optimizer, ema=True)

    def state(self, optimizer, **options):
        return training.init_state(
            self.model, optimizer, jax.random.key(7), self.example, **options
        )


@pytest.fixture(scope="session")
def problem():
    return Problem()
