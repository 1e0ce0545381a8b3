"""Samplers against diffusers' schedulers and ODEs whose solution is known."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from jaxmodels.ops.flow_samplers import (
    guided_velocity,
    resolution_shift,
    sample,
    shift_timesteps,
)

B, Y, X, C = 5, 7, 3, 2
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2}
every_method = pytest.mark.parametrize("method", ORDERS)


@pytest.fixture
def production(monkeypatch):
    """Without the suite's shape checks, as users run it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def column(t):
    return t.reshape(-1, *[1] * 3)


MEAN, STD = 0.6, 0.37


def gaussian_velocity(x, t):
    """Exact marginal velocity when the data are normal: linear in x, curved in t."""
    t = column(t)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (x - (1 - t) * MEAN) * (t - (1 - t) * STD**2) / variance


def curved_velocity(x, t):
    return jnp.sin(3 * x) * column(1 + t) - 0.3


@every_method
def test_error_falls_with_the_order_of_the_method(method):
    # x = g(t) + (x1 - g(1)) exp(k (t - 1)) solves x' = k (x - g) + g' for g = sin(3 t).
    noise, k, steps = normals(0, B, Y, X, C), 1.3, np.array([4, 8, 16, 32])
    exact = (noise.astype(np.float64) - np.sin(3)) * np.exp(-k)

    def velocity(x, t):
        return k * (x - column(jnp.sin(3 * t))) + column(3 * jnp.cos(3 * t))

    ends = [
        sample(velocity, jnp.asarray(noise), num_steps=n, method=method) for n in steps.tolist()
    ]
    errors = np.array([np.abs(end - exact).mean() for end in ends])
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDERS[method], abs=0.2)


@every_method
def test_straight_paths_need_one_step(method):
    data, noise = normals(1, B, Y, X, C), normals(2, B, Y, X, C)
    end = sample(lambda x, t: noise - data, jnp.asarray(noise), num_steps=1, method=method)
    np.testing.assert_allclose(end, data, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers(shift):
    noise, steps = normals(3, B, Y, X, C), 7
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    expected = [torch.tensor(noise)]
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        v = gaussian_velocity(expected[-1], sigma.repeat(B))
        expected.append(scheduler.step(v, timestep, expected[-1]).prev_sample)
    states = sample(
        gaussian_velocity, jnp.asarray(noise), num_steps=steps, shift=shift, return_trajectory=True
    )
    chex.assert_shape(states, (steps + 1, B, Y, X, C))
    np.testing.assert_allclose(states, torch.stack(expected).numpy(), atol=2e-5)


def test_heun_equals_diffusers_before_its_last_step():
    noise, steps = normals(4, B, Y, X, C), 5
    scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(steps)
    sigmas = torch.unique_consecutive(scheduler.sigmas)
    state, expected = torch.tensor(noise), [torch.tensor(noise)]
    for i, timestep in enumerate(scheduler.timesteps[:-1]):
        v = gaussian_velocity(state, (timestep / 1000).repeat(B))
        state = scheduler.step(v, timestep, state).prev_sample
        if i % 2:
            expected.append(state)
    # The last interval, where diffusers falls back to Euler, is left out.
    states = sample(
        gaussian_velocity,
        jnp.asarray(noise),
        timesteps=jnp.asarray(sigmas[:-1].numpy()),
        method="heun",
        return_trajectory=True,
    )
    chex.assert_shape(states, (steps, B, Y, X, C))
    np.testing.assert_allclose(states, torch.stack(expected).numpy(), atol=2e-5)


@every_method
def test_values_and_gradients_on_a_linear_field(method):
    noise, rate, n = normals(5, B, X), 0.7, 6
    h = 1 / n

    def end(noise, rate):
        return sample(lambda x, t: rate * x, noise, num_steps=n, method=method)

    factor = 1 - rate * h + (rate * h) ** 2 / 2 * (method != "euler")
    factor_slope = -h + rate * h**2 * (method != "euler")
    np.testing.assert_allclose(end(jnp.asarray(noise), rate), factor**n * noise, rtol=1e-5)
    grad_noise, grad_rate = jax.grad(lambda *a: jnp.sum(end(*a)), argnums=(0, 1))(
        jnp.asarray(noise), rate
    )
    np.testing.assert_allclose(grad_noise, np.full((B, X), factor**n), rtol=1e-5)
    expected = n * factor ** (n - 1) * factor_slope * noise.sum(dtype=np.float64)
    np.testing.assert_allclose(grad_rate, expected, rtol=1e-4)


@every_method
def test_trajectory_starts_with_noise_and_ends_with_the_sample(method):
    noise = jnp.asarray(normals(6, B, Y, X, C))
    states = sample(curved_velocity, noise, num_steps=3, method=method, return_trajectory=True)
    np.testing.assert_array_equal(states[0], noise)
    end = sample(curved_velocity, noise, num_steps=3, method=method)
    np.testing.assert_allclose(states[-1], end, atol=1e-6)
    assert jnp.all(jnp.abs(jnp.diff(states, axis=0)).max(axis=(1, 2, 3, 4)) > 0.05)


@every_method
def test_each_step_asks_for_the_velocity_as_often_as_promised(method):
    seen = []

    def velocity(x, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        return x

    sample(velocity, jnp.ones((2, 3)), num_steps=2, method=method)
    jax.effects_barrier()
    expected = {
        "euler": [1.0, 0.5],
        "midpoint": [1.0, 0.75, 0.5, 0.25],
        "heun": [1.0, 0.5, 0.5, 0.0],
    }
    assert seen == [[t, t] for t in expected[method]]


@every_method
def test_one_scan_whatever_the_number_of_steps(method):
    def end(noise):
        return sample(curved_velocity, noise, num_steps=23, method=method)

    jaxpr = jax.make_jaxpr(end)(jnp.ones((B, Y, X, C)))
    assert str(jaxpr).count(" scan[") == 1
    assert str(jaxpr).count(" sin ") == ORDERS[method]


@every_method
def test_low_precision_states_see_float32_times(method):
    def velocity(x, t):
        assert t.dtype == jnp.float32
        assert x.dtype == jnp.bfloat16
        return curved_velocity(x, t).astype(jnp.bfloat16)

    noise = jnp.asarray(normals(7, B, Y, X, C))
    end = sample(velocity, noise.astype(jnp.bfloat16), num_steps=5, method=method)
    assert end.dtype == jnp.bfloat16
    expected = sample(curved_velocity, noise, num_steps=5, method=method)
    np.testing.assert_allclose(end.astype(jnp.float32), expected, atol=0.1)


def test_low_precision_velocities_are_averaged_in_float32():
    low, high = jnp.bfloat16(1), jnp.bfloat16(1.0078125)  # neighbours
    end = sample(
        lambda x, t: jnp.where(column(t) == 1, low, high) + 0 * x.astype(jnp.bfloat16),
        jnp.zeros((B, Y, X, C)),
        num_steps=1,
        method="heun",
    )
    np.testing.assert_array_equal(end, -1.00390625)


def test_low_precision_timesteps_reach_the_velocity_as_float32():
    def velocity(x, t):
        assert t.dtype == jnp.float32
        return x

    sample(velocity, jnp.ones((B, X)), timesteps=jnp.array([1, 0.5, 0], jnp.bfloat16))


@every_method
def test_under_vmap_and_jit(method):
    chex.clear_trace_counter()
    noise = jnp.asarray(normals(8, 2, B, Y, X, C))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def end(noise):
        return sample(curved_velocity, noise, num_steps=4, shift=1.7, method=method)

    each = jnp.stack([end(one) for one in noise])
    together = jax.vmap(
        lambda one: sample(curved_velocity, one, num_steps=4, shift=1.7, method=method)
    )(noise)
    np.testing.assert_allclose(together, each, atol=1e-5)


def test_timesteps_replace_a_schedule():
    noise = jnp.asarray(normals(9, B, Y, X, C))
    times = shift_timesteps(jnp.linspace(1, 0, 6), 2.3)
    np.testing.assert_array_equal(
        sample(curved_velocity, noise, timesteps=times),
        sample(curved_velocity, noise, num_steps=5, shift=2.3),
    )


def test_shift_equals_the_formula_and_is_undone_by_its_inverse():
    t = np.linspace(0, 1, 11)
    shifted = shift_timesteps(jnp.float32(t), 3.0)
    np.testing.assert_allclose(shifted, 3 * t / (1 + 2 * t), rtol=1e-6)
    np.testing.assert_allclose(shift_timesteps(shifted, 1 / 3), t, atol=1e-6)
    # Equation 23 keeps the ratio of noise to signal times the shift.
    inner = np.float64(shifted[1:-1])
    np.testing.assert_allclose(inner / (1 - inner), 3 * t[1:-1] / (1 - t[1:-1]), rtol=1e-5)


def test_resolution_shift():
    assert resolution_shift(1024 * 1024, 256 * 256) == pytest.approx(4)
    assert resolution_shift(7, 11) == pytest.approx((7 / 11) ** 0.5)


class Labelled:
    """A velocity that depends on the label, and remembers the batches it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, labels):
        self.batches.append(x.shape[0])
        return x * column(t) + column(labels) ** 2


LABELS, NULL = jnp.arange(B), 11


@pytest.mark.parametrize("scale", [0.0, 0.4, 2.5])
def test_guidance_equals_its_formula_in_one_call(scale):
    x, t = normals(10, B, Y, X, C), np.linspace(0.1, 0.9, B).astype(np.float32)
    model = Labelled()
    actual = guided_velocity(model, scale, LABELS, NULL)(jnp.asarray(x), jnp.asarray(t))
    label_part = NULL**2 + scale * (np.arange(B) ** 2 - NULL**2)
    np.testing.assert_allclose(actual, x * column(t) + column(label_part), rtol=1e-4, atol=1e-4)
    assert model.batches == [2 * B]


@pytest.mark.parametrize("scale", [1.0, 1])
def test_guidance_of_one_is_the_model_at_the_price_of_one(scale, production):
    x, t = jnp.asarray(normals(11, B, Y, X, C)), jnp.linspace(0.1, 0.9, B)
    model = Labelled()
    actual = guided_velocity(model, scale, LABELS, NULL)(x, t)
    np.testing.assert_array_equal(actual, x * column(t) + column(LABELS) ** 2)
    assert model.batches == [B]


def test_guidance_scale_may_be_traced_and_keeps_a_low_precision():
    x, t = jnp.ones((B, 1, 1, 1), jnp.bfloat16), jnp.zeros(B)

    @jax.jit
    def guided(scale):
        return guided_velocity(lambda x, t, y: x * column(y), scale, LABELS, NULL)(x, t)

    assert guided(jnp.float32(1.5)).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        guided(jnp.float32(1.5)).ravel(), 11 + 1.5 * (np.arange(B) - 11.0), rtol=1e-2
    )


def test_guidance_works_inside_the_sampler():
    noise = jnp.asarray(normals(12, B, 1, 1, 1))
    # The guided velocity is constant, so one step is exact.
    model = guided_velocity(lambda x, t, y: column(y) + 0 * x, 3.0, LABELS, NULL)
    expected = noise - column(NULL + 3.0 * (LABELS - NULL))
    np.testing.assert_allclose(sample(model, noise, num_steps=4), expected, atol=1e-5)


NOISE = np.ones((5, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sample(jnp.add, NOISE, num_steps=2, method="rk4"),
            r"sample: unknown method 'rk4'; choose from \['euler', 'heun', 'midpoint'\]",
        ),
        (lambda: sample(jnp.add, NOISE), r"num_steps=None and timesteps=None; give exactly one"),
        (
            lambda: sample(jnp.add, NOISE, num_steps=1, timesteps=jnp.array([1.0, 0.0])),
            r"sample: num_steps=1 and timesteps=.*; give exactly one",
        ),
        (lambda: sample(jnp.add, NOISE, num_steps=0), r"sample: num_steps=0 must be at least 1"),
        (
            lambda: sample(jnp.add, NOISE, timesteps=jnp.array([1.0, 0.0]), shift=2.0),
            r"sample: shift=2.0 is not applied to given timesteps",
        ),
        (
            lambda: sample(jnp.add, NOISE, timesteps=jnp.array([1.0])),
            r"sample: timesteps of shape \(1,\); give one dimension of at least two",
        ),
        (
            lambda: sample(jnp.add, NOISE, timesteps=jnp.ones((2, 3))),
            r"sample: timesteps of shape \(2, 3\)",
        ),
        (
            lambda: sample(lambda x, t: jnp.concatenate([x, x], -1), NOISE, num_steps=1),
            r"velocity_fn returned shape \(5, 6\) for a state of shape \(5, 3\)",
        ),
        (
            lambda: guided_velocity(Labelled(), 2.0, LABELS, NULL)(jnp.ones((3, 2)), jnp.ones(3)),
            r"guided_velocity: labels of shape \(5,\) for a state of shape \(3, 2\)",
        ),
        (lambda: shift_timesteps(jnp.ones(3), 0.0), r"shift_timesteps: shift=0.0 must be positive"),
        (
            lambda: resolution_shift(0, 64),
            r"resolution_shift: num_pixels=0 and base_num_pixels=64 must be positive",
        ),
        (
            lambda: resolution_shift(64, -1),
            r"resolution_shift: num_pixels=64 and base_num_pixels=-1 must be positive",
        ),
    ],
)
def test_bad_input(production, call, message):
    with pytest.raises(ValueError, match=message):
        call()
