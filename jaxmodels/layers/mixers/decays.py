"""How fast a fresh layer forgets: initial rates and time steps, as state-space models draw them.

A step's log decay is -exp(A_log) softplus(. + dt_bias).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def decay_rates(low: float, high: float) -> nn.initializers.Initializer:
    """An initializer: logarithms of rates that are uniform between `low` and `high`."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def step_biases(low: float = 1e-3, high: float = 0.1) -> nn.initializers.Initializer:
    """An initializer: biases whose softplus is evenly spread in magnitude from low to high."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        span = math.log(low), math.log(high)
        step = jnp.exp(jax.random.uniform(key, shape, dtype, *span))
        return step + jnp.log(-jnp.expm1(-step))

    return init
