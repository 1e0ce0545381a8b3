"""Stochastic approximation against NumPy in float64, torch's SGD and closed forms."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from jaxmodels.ops.stochastic_approximation import (
    incremental_mean,
    meets_robbins_monro,
    power_step_sizes,
    robbins_monro,
)


@pytest.mark.parametrize("shape", [(1,), (7,), (11, 2, 3)])
def test_incremental_mean_is_the_mean_of_every_beginning(shape):
    values = np.random.default_rng(0).normal(3, 1, shape).astype(np.float32)
    counts = np.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    want = np.cumsum(values, axis=0, dtype=np.float64) / counts
    np.testing.assert_allclose(incremental_mean(jnp.asarray(values)), want, rtol=1e-5)


def test_incremental_mean_does_not_fill_up_as_a_sum_does():
    """As many as their number has no float16, and their sum even sooner."""
    values = jnp.full((70_000,), 40, jnp.float16).at[-1].set(40 + 70)
    means = incremental_mean(values)
    assert means.dtype == jnp.float16
    np.testing.assert_array_equal(means, 40)
    slow = incremental_mean(jnp.arange(6001, dtype=jnp.float16))  # whose steps are 1/2
    np.testing.assert_allclose(slow, np.arange(6001) / 2, atol=1)


def test_incremental_mean_is_a_case_of_robbins_monro():
    values = jax.random.normal(jax.random.key(0), (13, 2))
    sizes = power_step_sizes(jnp.arange(1, 14), 1)
    path = robbins_monro(lambda x, value: x - value, jnp.full((2,), 99.0), sizes, values)
    np.testing.assert_allclose(path, incremental_mean(values), rtol=1e-5, atol=1e-6)


def test_step_sizes_and_their_conditions():
    steps = np.array([1, 2, 16])
    np.testing.assert_allclose(power_step_sizes(jnp.asarray(steps), 0.75, 3.0), 3 / steps**0.75)
    np.testing.assert_array_equal(power_step_sizes(jnp.asarray(steps), 0.0), 1)
    powers = [0.0, 0.3, 0.5, 0.51, 0.75, 1.0, 1.01, 1.5]
    # Sums over blocks n to 4n: growing or constant ones diverge, shrinking ones converge.
    blocks = [np.arange(4.0**k, 4.0 ** (k + 1)) for k in (8, 9)]
    for power in powers:
        whole, squared = (
            np.divide(*(np.sum(block ** (-p)) for block in reversed(blocks)))
            for p in (power, 2 * power)
        )
        assert meets_robbins_monro(power) == bool(whole >= 0.9999 and squared < 0.9999)


def test_finds_a_quantile_from_yes_and_no():
    """Whether a draw lies below x is all that is observed."""
    draws = jax.random.normal(jax.random.key(1), (20_000, 32))
    sizes = power_step_sizes(jnp.arange(1, 20_001), 0.8, 3.0)
    path = robbins_monro(lambda x, o: (o <= x) - 0.9, jnp.zeros(32), sizes, draws)
    root = scipy.stats.norm.ppf(0.9)
    assert np.abs(path[-1] - root).max() < 0.15
    assert np.abs(path[-1] - root).mean() < 0.3 * np.abs(path[100] - root).mean()


def test_the_expected_path_of_a_linear_function_is_a_product():
    """E[x_n - root] = prod (1 - a_k) (x_1 - root): for summable steps it stays away from 0."""
    sizes = power_step_sizes(jnp.arange(1, 401), 1.5, 0.5)
    noise = jax.random.normal(jax.random.key(2), (400, 4096))
    path = robbins_monro(lambda x, o: x - 2.0 + o, jnp.full(4096, 12.0), sizes, noise)
    want = 2 + 10 * np.cumprod(1 - np.asarray(sizes, np.float64))
    np.testing.assert_allclose(path.mean(axis=1), want, atol=0.1)
    assert want[-1] > 3


def test_stochastic_gradient_descent_is_a_case():
    """Of a tree of parameters, with falling steps, against torch.optim.SGD."""
    rng = np.random.default_rng(3)
    inputs, targets = rng.normal(size=(17, 5)), rng.normal(size=17)
    weights = rng.normal(size=5)
    sizes = power_step_sizes(jnp.arange(1, 18), 0.6, 0.1)

    def loss(params, example):
        x, y = example
        return jnp.square(jnp.tanh(x @ params["weights"]) + params["bias"] - y)

    start = {"weights": jnp.asarray(weights, jnp.float32), "bias": jnp.float32(0.5)}
    data = tuple(jnp.asarray(a, jnp.float32) for a in (inputs, targets))
    path = robbins_monro(jax.grad(loss), start, sizes, data)

    w, b = torch.tensor(weights, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.SGD([w, b], lr=1.0)
    for n, (x, y) in enumerate(zip(torch.tensor(inputs), torch.tensor(targets), strict=True)):
        optimizer.param_groups[0]["lr"] = 0.1 / (n + 1) ** 0.6
        optimizer.zero_grad()
        ((torch.tanh(x @ w) + b - y) ** 2).backward()
        optimizer.step()
        np.testing.assert_allclose(path["weights"][n], w.detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(path["bias"][n], b.item(), rtol=1e-4, atol=1e-5)


def test_bad_input():
    def message(function, *arguments):
        with pytest.raises(ValueError) as caught:
            inspect.unwrap(function)(*arguments)
        return str(caught.value)

    rows = jnp.zeros((5, 2))
    found = message(robbins_monro, lambda x, o: x, rows[0], jnp.ones(4), rows)
    assert found == (
        "robbins_monro: observations of shape (5, 2) for 4 step_sizes; give one row for each"
    )
    assert "steps holds 0, outside [1," in message(power_step_sizes, jnp.arange(3), 1.0)
    assert "power holds -1, outside [0," in message(power_step_sizes, jnp.arange(1, 3), -1.0)
    assert "scale holds 0, outside (0," in message(power_step_sizes, jnp.arange(1, 3), 1.0, 0.0)
