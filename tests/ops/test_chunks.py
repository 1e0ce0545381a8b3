"""Cutting into chunks, borders of documents inside them, and decays, by plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.chunks import (
    chunk_decays,
    chunk_documents,
    decayed_products,
    fit_chunk_size,
    join_chunks,
    split_chunks,
)

BATCH, LENGTH, HEADS, WIDTH, SIZE = 2, 13, 3, 5, 4
CHUNKS = 4
# Borders at a chunk's edge, inside a chunk, two in one chunk; an id that returns.
SEGMENTS = np.array(
    [[7, 7, 7, 7, 2, 2, 7, 9, 9, 9, 9, 9, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3]]
)


@pytest.mark.parametrize(
    "chunk_size, length, expected",
    [(64, 1, 1), (64, 17, 32), (64, 1000, 64), (48, 1000, 64), (1, 9, 1), (7, 5, 8)],
)
def test_chunk_sizes_are_powers_of_two_that_fit(chunk_size, length, expected):
    assert fit_chunk_size(chunk_size, length) == expected


def test_chunks_are_consecutive_steps_padded_with_zeros():
    x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, HEADS, WIDTH)).astype(np.float32)
    chunks = split_chunks(jnp.asarray(x), SIZE)
    assert chunks.shape == (CHUNKS, BATCH, HEADS, SIZE, WIDTH)
    for n, b, h, c in np.ndindex(CHUNKS, BATCH, HEADS, SIZE):
        t = n * SIZE + c
        np.testing.assert_array_equal(chunks[n, b, h, c], x[b, t, h] if t < LENGTH else 0)
    np.testing.assert_array_equal(join_chunks(chunks, LENGTH), x)
    np.testing.assert_array_equal(split_chunks(jnp.asarray(x[..., 0]), SIZE), chunks[..., 0])


def documents_of(b):
    """The number of each token's document, and of the padding after them."""
    changes = np.diff(SEGMENTS[b], prepend=SEGMENTS[b, :1]) != 0
    index = np.cumsum(changes)
    return np.pad(index, (0, CHUNKS * SIZE - LENGTH), mode="edge")


def test_documents_of_chunks():
    found = chunk_documents(jnp.asarray(SEGMENTS), SIZE)
    for n, b in np.ndindex(CHUNKS, BATCH):
        index = documents_of(b)
        inside = index[n * SIZE : (n + 1) * SIZE]
        before = index[n * SIZE - 1] if n else 0
        np.testing.assert_array_equal(found.same[n, b, 0], inside[:, None] == inside)
        np.testing.assert_array_equal(found.from_start[n, b, 0], inside == before)
        np.testing.assert_array_equal(found.to_end[n, b, 0], inside == inside[-1])
        assert found.through[n, b, 0] == (inside[-1] == before)


def gates(shape, seed=0):
    """Log decays from nothing to everything, in chunks, with the padding's zeros."""
    rng = np.random.default_rng(seed)
    gates = rng.choice([0.0, -0.3, -2.0, -1e4, -np.inf], p=[0.1, 0.4, 0.3, 0.1, 0.1], size=shape)
    return split_chunks(jnp.asarray(gates, jnp.float32), SIZE)


def kept(log_decay, same, first, last):
    """What is left after the steps first + 1 ... last, if all is of one document."""
    return np.exp(np.sum(log_decay[first + 1 : last + 1], axis=0)) * same


def expected_decays(log_decay, b, n):
    """(pairs, from_start, to_end, through) of one chunk; log_decay is (C,) or (C, K)."""
    index = documents_of(b)
    before = index[n * SIZE - 1] if n else 0
    index = index[n * SIZE : (n + 1) * SIZE]
    last = SIZE - 1
    pairs = np.zeros((SIZE, SIZE, *log_decay.shape[1:]))
    for t in range(SIZE):
        for s in range(t + 1):
            pairs[t, s] = kept(log_decay, index[t] == index[s], s, t)
    start = [kept(log_decay, index[t] == before, -1, t) for t in range(SIZE)]
    end = [kept(log_decay, index[t] == index[-1], t, last) for t in range(SIZE)]
    return pairs, start, end, kept(log_decay, index[-1] == before, -1, last)


def test_decays_of_a_head():
    log_decay = gates((BATCH, LENGTH, HEADS))
    documents = chunk_documents(jnp.asarray(SEGMENTS), SIZE)
    found = jax.jit(chunk_decays)(log_decay, documents)
    for n, b, h in np.ndindex(CHUNKS, BATCH, HEADS):
        expected = expected_decays(np.asarray(log_decay[n, b, h], np.float64), b, n)
        for actual, value in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual[n, b, h], value, atol=1e-5)


def test_decays_and_products_of_channels():
    rng = np.random.default_rng(1)
    shape = (CHUNKS, BATCH, HEADS, SIZE, WIDTH)
    q, k = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    log_decay = gates((BATCH, LENGTH, HEADS, WIDTH))
    documents = chunk_documents(jnp.asarray(SEGMENTS), SIZE)
    run = jax.jit(decayed_products)
    products, decays = run([jnp.asarray(q), jnp.asarray(k)], jnp.asarray(k), log_decay, documents)
    for n, b, h in np.ndindex(CHUNKS, BATCH, HEADS):
        at = n, b, h
        pairs, *rest = expected_decays(np.asarray(log_decay[at], np.float64), b, n)
        for rows, product in zip((q, k), products, strict=True):
            expected = np.einsum("tk,sk,tsk->ts", rows[at], k[at], pairs)
            np.testing.assert_allclose(product[at], expected, atol=1e-5)
        for actual, value in zip(decays, rest, strict=True):
            np.testing.assert_allclose(actual[at], value, atol=1e-6)
