"""Patches against explicit loops and torch's pixel operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.patches import patchify, unpatchify


@settings(deadline=None, max_examples=8)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 3),
    channels=st.integers(1, 3),
    batch=st.lists(st.integers(1, 2), max_size=2),
)
def test_placement_and_inverse(rows, columns, patch, channels, batch):
    shape = (*batch, rows * patch, columns * patch, channels)
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tokens = patchify(jnp.asarray(image), patch)
    expected = [
        image[..., y * patch : (y + 1) * patch, x * patch : (x + 1) * patch, :].reshape(*batch, -1)
        for y in range(rows)
        for x in range(columns)
    ]
    np.testing.assert_array_equal(tokens, np.stack(expected, axis=-2))
    np.testing.assert_array_equal(unpatchify(tokens, rows, columns, patch), image)


def test_equals_pixel_unshuffle():
    image = np.random.default_rng(0).normal(size=(2, 6, 15, 5)).astype(np.float32)
    theirs = torch.nn.functional.pixel_unshuffle(torch.tensor(image).permute(0, 3, 1, 2), 3)
    # torch: channels slowest, then the pixels of a patch.
    theirs = theirs.reshape(2, 5, 9, 2 * 5).permute(0, 3, 2, 1).reshape(2, 10, 45).numpy()
    np.testing.assert_array_equal(jax.jit(patchify, static_argnums=1)(image, 3), theirs)


def test_gradient_and_vmap():
    image = jax.random.normal(jax.random.key(0), (3, 4, 10, 7))
    weights = jax.random.normal(jax.random.key(1), (3, 10, 28))
    gradient = jax.grad(lambda i: (patchify(i, 2) * weights).sum())(image)
    np.testing.assert_array_equal(gradient, unpatchify(weights, 2, 5, 2))
    np.testing.assert_array_equal(jax.vmap(lambda i: patchify(i, 2))(image), patchify(image, 2))


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"patchify: patch_size=2 does not divide .* 4 x 5 pixels"):
        patchify(jnp.zeros((3, 4, 5, 7)), 2)
    with pytest.raises(ValueError, match=r"unpatchify: tokens of shape \(3, 12\) are not .* 2 x 2"):
        unpatchify(jnp.zeros((3, 12)), 2, 2, 2)
    with pytest.raises(ValueError, match="check rows, columns and patch_size"):
        unpatchify(jnp.zeros((4, 13)), 2, 2, 2)
