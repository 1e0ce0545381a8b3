"""The straight path, its loss and its weights against float64 definitions."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.integrate
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings

from jaxmodels.ops import flow

B, Y, X, C = 5, 7, 3, 2


@pytest.fixture
def production(monkeypatch):
    """Without the suite's shape checks, as users run it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def normals(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def as_torch(x):
    return torch.tensor(np.asarray(x))


def test_interpolate_equals_diffusers():
    x0, noise = normals(0, B, Y, X, C), normals(1, B, Y, X, C)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    timesteps = scheduler.timesteps[[0, 999, 131, 502, 877]]
    expected = scheduler.scale_noise(as_torch(x0), timesteps, as_torch(noise))
    actual = flow.interpolate(x0, noise, jnp.asarray(timesteps.numpy()) / 1000)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=5)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_any_shape_starts_at_data_ends_at_noise_and_moves_at_the_velocity(shape):
    x0, noise = normals(2, *shape), normals(3, *shape)
    zero, one = jnp.zeros(shape[0]), jnp.ones(shape[0])
    np.testing.assert_array_equal(flow.interpolate(x0, noise, zero), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, one), noise)
    _, speed = jax.jvp(lambda t: flow.interpolate(x0, noise, t), (0.3 * one,), (one,))
    np.testing.assert_allclose(flow.velocity(x0, noise), speed, rtol=1e-6)


def test_the_path_keeps_a_low_precision_but_not_its_arithmetic():
    x0, noise = jnp.full((B,), 1, jnp.bfloat16), jnp.full((B,), -3, jnp.bfloat16)
    t = jnp.full((B,), 0.2501)
    actual = flow.interpolate(x0, noise, t)
    assert actual.dtype == jnp.bfloat16
    # 1 - 4 t = -0.0004 is lost when t or its products are rounded to bfloat16.
    np.testing.assert_allclose(np.float32(actual), 1 - 4 * np.float32(t), rtol=5e-3)
    assert flow.velocity(x0, noise).dtype == jnp.bfloat16


def test_interpolate_under_vmap_and_grad():
    x0, noise = normals(4, 3, B, X), normals(5, 3, B, X)
    t = jax.random.uniform(jax.random.key(0), (3, B))
    every = jnp.stack([flow.interpolate(*one) for one in zip(x0, noise, t, strict=True)])
    chex.assert_trees_all_close(jax.jit(jax.vmap(flow.interpolate))(x0, noise, t), every)
    grad_x0, grad_noise = jax.grad(
        lambda a, b: jnp.sum(flow.interpolate(a, b, t[0])), argnums=(0, 1)
    )(x0[0], noise[0])
    np.testing.assert_allclose(grad_x0, np.repeat(1 - t[0][:, None], X, 1), rtol=1e-6)
    np.testing.assert_allclose(grad_noise, np.repeat(t[0][:, None], X, 1), rtol=1e-6)


def test_loss_and_its_gradient_equal_torch():
    prediction, target, weight = normals(6, B, Y, X), normals(7, B, Y, X), normals(8, B) ** 2
    guess = as_torch(prediction).requires_grad_()
    error = torch.nn.functional.mse_loss(guess, as_torch(target), reduction="none")
    expected = error.mean((1, 2))
    (expected * as_torch(weight)).sum().backward()
    np.testing.assert_allclose(
        flow.flow_matching_loss(prediction, target), expected.detach().numpy(), rtol=1e-5
    )
    loss, grad = jax.value_and_grad(lambda p: jnp.sum(flow.flow_matching_loss(p, target, weight)))(
        prediction
    )
    np.testing.assert_allclose(
        loss, (expected.detach().numpy() * np.asarray(weight)).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(grad, guess.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_loss_of_low_precision_is_float32():
    prediction = jnp.full((2, 4099), 1.0, jnp.bfloat16)
    loss = flow.flow_matching_loss(prediction, jnp.full((2, 4099), 1.0078125, jnp.bfloat16))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.0078125**2, rtol=1e-6)


@pytest.mark.parametrize("target", ["velocity", "noise", "data"])
def test_target_weight_turns_the_loss_into_that_of_another_prediction(target):
    x0, noise, guess = (np.float64(normals(seed, B, X)) for seed in (9, 10, 11))
    t = np.array([0.0, 0.13, 0.5, 0.71, 1.0])
    x_t = (1 - t)[:, None] * x0 + t[:, None] * noise
    truth, predicted = {
        "velocity": (noise - x0, guess),
        "noise": (noise, x_t + (1 - t)[:, None] * guess),
        "data": (x0, x_t - t[:, None] * guess),
    }[target]
    loss = flow.flow_matching_loss(
        jnp.float32(guess), jnp.float32(noise - x0), flow.target_weight(jnp.float32(t), target)
    )
    expected = ((predicted - truth) ** 2).mean(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


DENSITIES = [flow.Uniform(), flow.LogitNormal(0.4, 0.9), flow.Mode(1.29), flow.CosMap()]


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_a_density_equals_its_weight_under_uniform_timesteps(density):
    # Any error as a function of time; the mean over samples is the weighted integral.
    def error(t):
        return (t - 0.3) ** 2 + 0.2

    t = flow.sample_timesteps(jax.random.key(1), (20_011,), density, stratified=True)
    zero = jnp.zeros((20_011, 1))
    loss = flow.flow_matching_loss(jnp.sqrt(error(t))[:, None], zero)
    expected, _ = scipy.integrate.fixed_quad(
        lambda t: np.float64(density.density(jnp.float32(t))) * error(t), 0, 1, n=500
    )
    assert float(loss.mean()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_snr_weight_gives_the_same_objective_on_noise(density):
    t = np.linspace(0.01, 0.99, 101)
    step = 1e-6

    def log_snr(t):
        return np.log((1 - t) ** 2 / t**2)

    slope = (log_snr(t + step) - log_snr(t - step)) / (2 * step)
    noise_error = (1 - t) ** 2  # of a velocity error of one
    weight = np.float64(flow.snr_weight(jnp.float32(t), density))
    np.testing.assert_allclose(
        -0.5 * weight * slope * noise_error, density.density(jnp.float32(t)), rtol=1e-4
    )


def test_the_namespace_is_complete():
    for name in flow.__all__:
        assert getattr(flow, name).__doc__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: flow.interpolate(jnp.ones((5, 3)), jnp.ones((5, 2)), jnp.ones(5)),
            r"interpolate: x0 has shape \(5, 3\) but noise has \(5, 2\)",
        ),
        (
            lambda: flow.interpolate(jnp.ones((5, 3)), jnp.ones((5, 3)), jnp.ones((5, 1))),
            r"interpolate: t has shape \(5, 1\) for a batch of shape \(5, 3\); .*shape \(5,\)",
        ),
        (
            lambda: flow.velocity(jnp.ones((5, 3)), jnp.ones(3)),
            r"velocity: x0 has shape \(5, 3\) but noise has \(3,\)",
        ),
        (
            lambda: flow.flow_matching_loss(jnp.ones((5, 6)), jnp.ones((5, 3))),
            r"flow_matching_loss: prediction has shape \(5, 6\) but target has \(5, 3\)",
        ),
        (
            lambda: flow.flow_matching_loss(jnp.ones((5, 3)), jnp.ones((5, 3)), jnp.ones(3)),
            r"flow_matching_loss: weight has shape \(3,\) for a batch of shape \(5, 3\)",
        ),
        (
            lambda: flow.target_weight(jnp.ones(5), "score"),
            r"target_weight: unknown target 'score'; choose from \['velocity', 'noise', 'data'\]",
        ),
    ],
)
def test_bad_input(production, call, message):
    with pytest.raises(ValueError, match=message):
        call()
