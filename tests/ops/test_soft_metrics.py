"""Smooth surrogates: their limits are what NumPy, SciPy and scikit-learn compute exactly."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.soft_metrics import (
    soft_accuracy,
    soft_argmax,
    soft_f1,
    soft_iou,
    soft_maximum,
    soft_one_hot,
    soft_rank,
)

COLD = 1e-3
SHAPE = (3, 11)


def entries(seed, shape=SHAPE):
    """Values that differ by a tenth at the least, but for one pair of equals in each row."""
    rng = np.random.default_rng(seed)
    rows = rng.permuted(np.tile(np.arange(shape[-1]), (*shape[:-1], 1)), axis=-1) / 10
    rows[..., 1] = rows[..., 4]
    return jnp.asarray(rows, jnp.float32)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000))
def test_cold_limits_are_exact(seed):
    x = entries(seed)
    wide = np.asarray(x, np.float64)
    most = wide == wide.max(axis=-1, keepdims=True)
    shared = most / most.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(soft_maximum(x, COLD), wide.max(axis=-1), atol=COLD)
    np.testing.assert_allclose(soft_one_hot(x, COLD), shared, atol=1e-5)
    np.testing.assert_allclose(soft_argmax(x, COLD), shared @ np.arange(11), atol=1e-4)
    ranks = scipy.stats.rankdata(wide, method="average", axis=-1)
    np.testing.assert_allclose(soft_rank(x, COLD), ranks, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_warm_values_are_the_definitions(temperature):
    x = entries(1)
    wide = np.asarray(x, np.float64)
    weights = scipy.special.softmax(wide / temperature, axis=-1)
    np.testing.assert_allclose(soft_one_hot(x, temperature), weights, rtol=1e-5)
    np.testing.assert_allclose(soft_argmax(x, temperature), weights @ np.arange(11), rtol=1e-5)
    above = soft_maximum(x, temperature) - wide.max(axis=-1)
    np.testing.assert_allclose(
        above, -temperature * np.log(weights.max(axis=-1)), rtol=1e-4, atol=1e-6
    )
    assert np.all((above >= 0) & (above <= temperature * np.log(11)))
    ranks = np.ones(SHAPE)
    for i, j in np.ndindex(11, 11):
        if i != j:
            ranks[:, i] += scipy.special.expit((wide[:, i] - wide[:, j]) / temperature)
    np.testing.assert_allclose(soft_rank(x, temperature), ranks, rtol=1e-5)
    np.testing.assert_allclose(soft_rank(x, temperature).sum(axis=-1), 66, rtol=1e-5)


def test_the_gradient_of_the_maximum_is_the_one_hot():
    x = entries(2)
    gradient = jax.grad(lambda x: soft_maximum(x, 0.3).sum())(x)
    np.testing.assert_allclose(gradient, soft_one_hot(x, 0.3), rtol=1e-5, atol=1e-7)


def test_accuracy_cold_and_warm():
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(5, 7, 13)), rng.integers(0, 13, (5, 7))
    labels = np.where(rng.random((5, 7)) < 0.6, logits.argmax(axis=-1), labels)
    arrays = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    exact = sklearn.metrics.accuracy_score(labels.ravel(), logits.argmax(axis=-1).ravel())
    assert 0.5 < exact < 0.8
    np.testing.assert_allclose(soft_accuracy(*arrays, 1e-4), exact, atol=1e-4)
    warm = torch.softmax(torch.tensor(logits) / 1.7, -1).gather(-1, torch.tensor(labels)[..., None])
    np.testing.assert_allclose(soft_accuracy(*arrays, 1.7), warm.mean(), rtol=1e-5)
    assert soft_accuracy(*arrays) == soft_accuracy(*arrays, 1.0)


@pytest.mark.parametrize(
    ("ours", "exact"),
    [(soft_f1, sklearn.metrics.f1_score), (soft_iou, sklearn.metrics.jaccard_score)],
)
def test_counts_cold_and_warm(ours, exact):
    """Of four classes, the last of which is neither there nor found."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(17, 4)) - np.array([0, 1, 0, 9])
    targets = rng.random((17, 4)) < np.array([0.5, 0.2, 0.8, 0])
    found = ours(jax.nn.sigmoid(jnp.asarray(logits / 1e-4, jnp.float32)), targets * jnp.ones(()))
    want = exact(targets, logits > 0, average=None, zero_division=0)
    assert np.all((want[:3] > 0) & (want[:3] < 1)) and want[3] == 0
    np.testing.assert_allclose(found, want, atol=1e-5)
    p, y = scipy.special.expit(logits)[:, 1], targets[:, 1]
    hits, false, missed = (p * y).sum(), (p * ~y).sum(), ((1 - p) * y).sum()
    weight = 2 if ours is soft_f1 else 1
    np.testing.assert_allclose(
        ours(jnp.asarray(p, jnp.float32), jnp.asarray(y, jnp.float32)),
        weight * hits / (weight * hits + false + missed),
        rtol=1e-5,
    )


@pytest.mark.parametrize("score", [soft_f1, soft_iou])
def test_gradients_are_torchs_and_finite_with_nothing_there(score):
    rng = np.random.default_rng(5)
    logits, targets = rng.normal(size=(17, 3)), (rng.random((17, 3)) < 0.3).astype(float)
    wide, y = torch.tensor(logits, requires_grad=True), torch.tensor(targets)
    p = torch.sigmoid(wide)
    both = (p * y).sum(0)
    whole = (p + y).sum(0) if score is soft_f1 else (p + y - p * y).sum(0)
    (both / whole).sum().backward()
    weight = 2 if score is soft_f1 else 1

    def total(logits, targets):
        return score(jax.nn.sigmoid(logits), targets).sum()

    arrays = jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32)
    gradient = jax.jit(jax.grad(total))(*arrays)
    np.testing.assert_allclose(gradient, weight * wide.grad, rtol=1e-4, atol=1e-7)
    empty = jax.grad(lambda p: score(p, jnp.zeros((17, 3))).sum())(jnp.zeros((17, 3)))
    assert np.isfinite(empty).all()
    # A rare class that is missed altogether still pulls, where the exact score would not.
    rare = jnp.zeros(17).at[3].set(1.0)
    pull = jax.grad(lambda z: score(jax.nn.sigmoid(z), rare))(jnp.full(17, -4.0))
    assert pull[3] > 0 and np.all(np.delete(pull, 3) < 0)


def test_transformations_and_dtype():
    x = entries(6)
    for function in (soft_maximum, soft_one_hot, soft_argmax, soft_rank):
        mapped = jax.jit(jax.vmap(lambda row, f=function: f(row, 0.5)))(x)
        np.testing.assert_allclose(mapped, function(x, 0.5), rtol=1e-5, atol=1e-6)
        assert function(x.astype(jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_bad_input():
    x = jnp.zeros((2, 3))

    def message(function, *arguments):
        with pytest.raises(ValueError) as caught:
            inspect.unwrap(function)(*arguments)  # as users run it
        return str(caught.value)

    for function in (soft_maximum, soft_one_hot, soft_argmax, soft_rank):
        expected = f"{function.__name__}: temperature holds 0, outside (0, inf]"
        assert message(function, x, 0.0) == expected
    labels = jnp.zeros(2, int)
    assert "soft_accuracy: temperature holds -1" in message(soft_accuracy, x, labels, -1.0)
    assert "labels holds 3, outside [0, 2]" in message(soft_accuracy, x, labels + 3)
    assert "labels (3,) must be *B of logits" in message(soft_accuracy, x, jnp.zeros(3, int))
    for function in (soft_f1, soft_iou):
        assert f"{function.__name__}: targets (3, 2)" in message(function, x, x.T)
