"""Feature maps against torch, the series of exp, and what random features promise on average.

The statistics use fixed keys, so they do not change from run to run. A limit of
`SIGMAS` standard errors would be passed by a right implementation with another
key 9,999 times out of 10,000.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from jaxmodels.ops.feature_maps import (
    elu_plus_one,
    gaussian_projection,
    orthogonal_projection,
    positive_features,
    taylor_features,
    trigonometric_features,
)

SIGMAS = 3.9
WIDTH = 5
DRAWS = {"orthogonal": orthogonal_projection, "independent": gaussian_projection}
KERNELS = {"positive": positive_features, "trigonometric": trigonometric_features}


def draw(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def as_float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_elu_plus_one_equals_torch():
    x = torch.tensor(draw(5, 7, scale=3), requires_grad=True)
    expected = torch.nn.functional.elu(x) + 1
    weights = draw(5, 7, seed=1)
    (expected * torch.tensor(weights)).sum().backward()
    ours, weights = as_float32(x.detach().numpy(), weights)
    value, pull = jax.vjp(elu_plus_one, ours)
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(pull(weights)[0], x.grad, rtol=1e-5)


def test_elu_plus_one_stays_positive_and_its_gradient_finite():
    """elu(x) + 1 would be exactly zero from x = -17 on."""
    x = jnp.array([-50.0, -20.0, 0.0, 200.0])
    np.testing.assert_allclose(elu_plus_one(x), [np.exp(-50.0), np.exp(-20.0), 1, 201], rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: elu_plus_one(x).sum())(x)).all()


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_features_are_the_series_of_exp(order):
    q, k = draw(11, 5), draw(11, 5, seed=1)
    logits = np.sum(q * k, axis=-1)
    expected = 1 + logits + (logits**2 / 2 if order == 2 else 0)
    features = [taylor_features(x, order=order) for x in as_float32(q, k)]
    assert features[0].shape == (11, 6 if order == 1 else 6 + 15)
    np.testing.assert_allclose(jnp.sum(features[0] * features[1], -1), expected, rtol=1e-5)


def test_orthogonal_directions_are_orthogonal_in_blocks_and_gaussian_in_length():
    projection = np.asarray(orthogonal_projection(jax.random.key(0), 1203, 7), np.float64)
    assert projection.shape == (1203, 7)
    lengths = np.linalg.norm(projection, axis=1)
    directions = projection / lengths[:, None]
    for start in (0, 7, 1197):
        block = directions[start : start + 7]
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-5)
    assert abs(directions[0] @ directions[7]) > 1e-3
    # Squared lengths are chi-squared: mean 7 and variance 14.
    assert abs(np.mean(lengths**2) - 7) < SIGMAS * np.sqrt(14 / 1203)
    # Of a squared chi-squared deviation the variance is 12 K (K + 4) - (2 K)^2.
    assert abs(np.var(lengths**2) - 14) < SIGMAS * np.sqrt((12 * 7 * 11 - 14**2) / 1203)


@pytest.mark.parametrize("name", DRAWS)
def test_a_projection_is_redrawn_by_its_key(name):
    first, again, other = (DRAWS[name](jax.random.key(seed), 5, 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.all(first != other)


@functools.cache
def estimates(draws, kernel, features, scale=0.3, count=20_000):
    """Independent estimates of exp(q . k) over its value, (count, 6 pairs), in float64."""
    # The last pairs point to one side, where a rotation that is not uniform shows, and
    # are long enough for directions of a wrong length to show.
    q = np.concatenate([draw(4, WIDTH, seed=2, scale=scale), np.full((2, WIDTH), 0.4)])
    k = np.concatenate([draw(4, WIDTH, seed=3, scale=scale), np.eye(WIDTH)[:2] / 2 + 0.2])

    @jax.jit
    def estimate(key):
        projection = DRAWS[draws](key, features, WIDTH)
        (a, log_a), (b, log_b) = (KERNELS[kernel](x, projection) for x in as_float32(q, k))
        return jnp.sum(a * b, axis=-1) * jnp.exp(log_a + log_b)

    found = jax.vmap(estimate)(jax.random.split(jax.random.key(7), count))
    return np.asarray(found, np.float64) / np.exp(np.sum(q * k, axis=-1))


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_features_are_unbiased(draws, kernel):
    """One in 10,000 for each of the six pairs, see above. Seven is a block and a cut one."""
    found = estimates(draws, kernel, 7)
    standard_error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (standard_error < 0.02).all()
    assert (abs(found.mean(axis=0) - 1) < SIGMAS * standard_error).all()


def test_the_error_falls_with_the_number_of_features():
    """Independent features are an average: four times as many halve the error."""
    errors = [
        np.sqrt(np.mean((estimates("independent", "positive", features) - 1)[:, :4] ** 2, axis=0))
        for features in (7, 28, 112)
    ]
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 2, rtol=0.1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_orthogonal_features_have_the_smaller_error(kernel):
    squares = [
        (estimates(draws, kernel, WIDTH, scale=0.2, count=50_000)[:, :4] - 1) ** 2
        for draws in ("independent", "orthogonal")
    ]
    gain = (squares[0] - squares[1]).mean(axis=1)
    assert gain.mean() > SIGMAS * gain.std(ddof=1) / np.sqrt(len(gain))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_features_carry_the_whole_gradient(kernel):
    x, projection = draw(2, WIDTH), draw(3, WIDTH, seed=1)
    leaf, w = torch.tensor(x, requires_grad=True), torch.tensor(projection)
    square = (leaf**2).sum(-1, keepdim=True) / 2
    if kernel == "positive":
        expected = torch.exp(leaf @ w.T - square)
    else:
        expected = torch.exp(square) * torch.cat([torch.cos(leaf @ w.T), torch.sin(leaf @ w.T)], -1)
    weights = draw(*expected.shape, seed=2)
    (expected * torch.tensor(weights) / 3**0.5).sum().backward()
    ours, projection, weights = as_float32(x, projection, weights)

    def loss(x):
        features, log_scale = KERNELS[kernel](x, projection)
        return jnp.sum(weights * features * jax.lax.stop_gradient(jnp.exp(log_scale))[:, None])

    np.testing.assert_allclose(jax.grad(loss)(ours), leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_long_vectors_and_bfloat16_keep_finite_features(kernel):
    """exp(|x|^2 / 2) alone would be exp(810)."""
    x = jnp.asarray(draw(5, WIDTH, scale=1.0), jnp.bfloat16)
    x = x.at[0].set(18.0)
    projection = gaussian_projection(jax.random.key(0), 11, WIDTH)
    features, log_scale = KERNELS[kernel](x, projection)
    assert features.dtype == log_scale.dtype == jnp.float32
    wide = np.asarray(x, np.float64)
    projected = wide @ np.asarray(projection, np.float64).T
    half = np.sum(wide**2, axis=-1, keepdims=True) / 2
    if kernel == "positive":
        logs = projected - half
        assert float(jnp.max(features)) < 1.001 * 11**-0.5
        expected = np.exp(logs - logs.max(axis=-1, keepdims=True)) / np.sqrt(11)
        np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-30)
        np.testing.assert_allclose(log_scale, logs.max(axis=-1), rtol=1e-5)
    else:
        expected = np.concatenate([np.cos(projected), np.sin(projected)], -1) / np.sqrt(11)
        np.testing.assert_allclose(features, expected, atol=1e-4)
        np.testing.assert_allclose(log_scale, half[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: taylor_features(x, order=3), "taylor_features: order=3 must be 1 or 2"),
        (
            lambda x: positive_features(x, jnp.zeros((7, 4))),
            r"positive_features: projection \(7, 4\) must be \(M, K\) with the width K=5",
        ),
        (
            lambda x: trigonometric_features(x, jnp.zeros((7, 4))),
            r"trigonometric_features: projection \(7, 4\) must be .* of x \(2, 5\)",
        ),
        (
            lambda x: orthogonal_projection(jax.random.key(0), 0, 3),
            "orthogonal_projection: features=0 and width=3 must be at least 1",
        ),
        (
            lambda x: gaussian_projection(jax.random.key(0), 5, 0),
            "gaussian_projection: features=5 and width=0 must be at least 1",
        ),
    ],
)
def test_bad_input_says_what_to_do(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, WIDTH)))
