"""Channels to pixels against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.pixel_shuffle import pixel_shuffle, pixel_unshuffle


def last(x):
    return np.moveaxis(x.numpy(), -3, -1)


@settings(deadline=None, max_examples=8)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    channels=st.integers(1, 3),
    factor=st.integers(1, 3),
    batch=st.lists(st.integers(1, 2), max_size=2),
)
def test_equals_torch_and_inverts(rows, columns, channels, factor, batch):
    shape = (*batch, channels * factor**2, rows, columns)
    theirs = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)
    x = jnp.asarray(last(theirs))
    out = pixel_shuffle(x, factor)
    np.testing.assert_array_equal(out, last(torch.nn.functional.pixel_shuffle(theirs, factor)))
    np.testing.assert_array_equal(pixel_unshuffle(out, factor), x)


def test_gradient_jit_and_vmap():
    x = jax.random.normal(jax.random.key(0), (3, 5, 7, 12))
    weights = jax.random.normal(jax.random.key(1), (3, 10, 14, 3))
    gradient = jax.jit(jax.grad(lambda x: (pixel_shuffle(x, 2) * weights).sum()))(x)
    np.testing.assert_array_equal(gradient, pixel_unshuffle(weights, 2))
    np.testing.assert_array_equal(jax.vmap(lambda x: pixel_shuffle(x, 2))(x), pixel_shuffle(x, 2))


def test_bad_input():
    with pytest.raises(ValueError, match=r"pixel_shuffle: factor=2 squared does not .* 6 channels"):
        pixel_shuffle(jnp.zeros((3, 4, 6)), 2)
    with pytest.raises(ValueError, match="pixel_shuffle: factor=0"):
        pixel_shuffle(jnp.zeros((3, 4, 6)), 0)
    with pytest.raises(ValueError, match=r"pixel_unshuffle: factor=2 .* \(4, 3, 6\)"):
        pixel_unshuffle(jnp.zeros((4, 3, 6)), 2)
    with pytest.raises(ValueError, match="pixel_unshuffle: factor=0"):
        pixel_unshuffle(jnp.zeros((4, 2, 6)), 0)
