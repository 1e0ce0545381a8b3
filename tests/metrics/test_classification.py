"""Top-k accuracy against scikit-learn, and its ties by hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from jaxmodels.metrics import top_k_accuracy


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_equals_scikit_learn(k):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(101, 7)).astype(np.float32)
    labels = rng.integers(7, size=101)
    want = 1.0 if k == 7 else top_k_accuracy_score(labels, logits, k=k, labels=np.arange(7))
    got = jax.jit(top_k_accuracy, static_argnums=2)(logits, labels, k)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(top_k_accuracy(jnp.asarray(logits), jnp.asarray(labels), k), got)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_of_equal_logits_the_lower_class_comes_first(k):
    logits = jnp.array(np.random.default_rng(1).integers(0, 3, (60, 5)), jnp.float32)
    labels = jnp.arange(60) % 5
    _, best = jax.lax.top_k(logits, k)
    want = np.mean(np.any(np.asarray(best) == np.asarray(labels)[:, None], axis=1))
    np.testing.assert_allclose(top_k_accuracy(logits, labels, k), want, rtol=1e-6)
    assert top_k_accuracy(jnp.zeros((5, 5)), jnp.arange(5), k) == pytest.approx(k / 5)


def test_nan_is_never_right():
    assert top_k_accuracy(jnp.full((4, 3), jnp.nan), jnp.array([0, 1, 2, 0]), 3) == 0
    spoiled = jnp.array([[jnp.nan, 1.0, 0.0]])
    assert top_k_accuracy(spoiled, jnp.array([1]), 1) == 0
    assert top_k_accuracy(spoiled, jnp.array([1]), 2) == 1


@pytest.mark.parametrize(
    ("labels", "k", "message"),
    [
        ([0, 1, 2], 1, r"labels \(3,\) must be \(B,\) of logits \(B, K\) = \(2,\)"),
        ([0, 3], 1, r"labels holds 3, outside \[0, 2\]"),
        ([0, -1], 1, r"labels holds -1, outside \[0, 2\]"),
        ([0, 1], 4, r"k holds 4, outside \[1, 3\]"),
    ],
)
def test_bad_input_is_named(labels, k, message):
    with pytest.raises(ValueError, match=f"top_k_accuracy: {message}"):
        inspect.unwrap(top_k_accuracy)(jnp.zeros((2, 3)), jnp.array(labels), k)
