"""The softmax over time as a recurrence, against the definition in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.running_softmax import EMPTY_LOG_SUM, document_softmax, running_softmax

BATCH, LENGTH, HEADS, FEATURES = 2, 17, 3, 5
SEGMENTS = np.repeat([[3, 1, 3, 2]], [4, 5, 1, 7], axis=1) + np.array([[0], [10]])
ENDS = [0, 4, 9, 10, 17]
EMPTY = jnp.full((BATCH, HEADS, FEATURES), EMPTY_LOG_SUM)


def draw(scale=3.0):
    return scale * np.random.default_rng(0).normal(size=(BATCH, LENGTH, HEADS, FEATURES))


def softmax(x):
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("ends", [[0, LENGTH], ENDS])
def test_document_softmax_is_the_softmax_of_each_document(ends):
    x = draw()
    expected = np.concatenate([softmax(x[:, a:b]) for a, b in itertools.pairwise(ends)], axis=1)
    ids = None if len(ends) == 2 else jnp.asarray(SEGMENTS)
    found = jax.jit(document_softmax)(jnp.asarray(x, jnp.float32), ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_decayed_weights_are_the_softmax_of_the_tokens_so_far(segmented, scale):
    """With differences of a thousand as well, and cut in two with the sum handed on."""
    x = draw(scale)
    ids = SEGMENTS if segmented else np.zeros_like(SEGMENTS)
    run = jax.jit(running_softmax)
    parts, log_sum = [], EMPTY
    for part in (slice(0, 6), slice(6, LENGTH)):
        segments = jnp.asarray(ids[:, part]) if segmented else None
        weights, log_decay, log_sum = run(jnp.asarray(x[:, part], jnp.float32), log_sum, segments)
        parts.append((weights, log_decay))
    weights, log_decay = (np.concatenate(pair, axis=1) for pair in zip(*parts, strict=True))
    assert (log_decay <= 0).all() and (weights <= 1).all()
    start = 0
    for t in range(LENGTH):
        if t and ids[0, t] != ids[0, t - 1]:
            start = t
            assert not log_decay[:, t].any()
        # What a token weighs later is its weight and every decay after it.
        left = np.flip(np.cumsum(np.flip(log_decay[:, start + 1 : t + 1], 1), axis=1), 1)
        left = np.concatenate(
            [left, np.zeros_like(left[:, :1] if t > start else log_decay[:, :1])], 1
        )
        found = weights[:, start : t + 1] * np.exp(left)
        np.testing.assert_allclose(found, softmax(x[:, start : t + 1]), rtol=1e-3, atol=2e-5)
    expected = np.log(np.sum(np.exp(x[:, start:] - x[:, start:].max(1, keepdims=True)), axis=1))
    np.testing.assert_allclose(log_sum, expected + x[:, start:].max(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 128, 131, 300])
@pytest.mark.parametrize("segmented", [False, True])
def test_many_tokens_and_gradients_against_float64(length, segmented):
    """Chunks that are full and not, documents within one, across several and of one token."""
    rng = np.random.default_rng(length)
    x, given = 3 * rng.normal(size=(2, 2, length, 2, 3))
    starts = (rng.random((2, length)) < 0.03) | (np.arange(length) % 131 == 70) * segmented
    ids = np.cumsum(starts & segmented, axis=1)
    before = np.tril(np.ones((length, length), bool))
    same = (ids[:, :, None] == ids[:, None, :]) & before  # (B, T, S): s is in the sum of t
    terms = np.where(same[..., None, None], np.exp(x)[:, None], 0)
    sums = terms.sum(axis=2)
    wanted = (given[:, :, None] * terms / sums[:, :, None]).sum(axis=1)

    @jax.jit
    def run(x, given, ids):
        def sums(x):
            weights, _, _ = running_softmax(x, EMPTY[:, :2, :3], ids)
            return x - jnp.log(weights)

        found, pull_back = jax.vjp(sums, x)
        return found, pull_back(given)[0]

    ids = jnp.asarray(ids) if segmented else None
    found, gradient = run(*(jnp.asarray(a, jnp.float32) for a in (x, given)), ids)
    np.testing.assert_allclose(found, np.log(sums), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_are_finite_from_an_empty_start(segmented):
    ids = jnp.asarray(SEGMENTS) if segmented else None

    @jax.jit
    def gradient(x):
        def loss(x):
            weights, log_decay, log_sum = running_softmax(x, EMPTY, ids)
            return jnp.sum(weights) + jnp.sum(jnp.exp(log_decay)) + jnp.sum(log_sum)

        return jax.grad(loss)(x)

    for scale in (1.0, 300.0):
        assert jnp.isfinite(gradient(jnp.asarray(draw(scale), jnp.float32))).all()
