"""Every way to enlarge a map: how it starts, and its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxmodels.layers.upsample import METHODS, Upsample, bilinear_kernel


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def interpolated(x, size, mode):
    out = functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2), size, mode=mode)
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_transposed_starts_as_bilinear(factor):
    x = image(2, 5, 7, 3)
    size = (5 * factor, 7 * factor)
    out, _ = Upsample(factor, "transposed").init_with_output(
        jax.random.key(0), jnp.asarray(x), size
    )
    expected = interpolated(x, size, "bilinear")
    # At the border the one blends with zeros and the other repeats.
    inside = (slice(None), slice(factor, -factor), slice(factor, -factor))
    np.testing.assert_allclose(out[inside], expected[inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_starts_as_nearest(factor):
    x = image(2, 5, 7, 3)
    size = (5 * factor, 7 * factor)
    model = Upsample(factor, "pixel_shuffle")
    out, _ = model.init_with_output(jax.random.key(0), jnp.asarray(x), size)
    np.testing.assert_allclose(out, interpolated(x, size, "nearest"), rtol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resizing_has_no_parameters(mode):
    x = image(2, 5, 7, 3)
    out, variables = Upsample(4, mode).init_with_output(jax.random.key(0), jnp.asarray(x), (18, 27))
    np.testing.assert_allclose(out, interpolated(x, (18, 27), mode), rtol=1e-5, atol=1e-5)
    assert not variables


@pytest.mark.parametrize("method", ["transposed", "pixel_shuffle"])
def test_cut_below_and_on_the_right(method):
    x = jnp.asarray(image(2, 5, 7, 3))
    model = Upsample(4, method)
    whole, variables = model.init_with_output(jax.random.key(0), x, (20, 28))
    np.testing.assert_array_equal(model.apply(variables, x, (18, 25)), whole[:, :18, :25])


def test_bilinear_kernel():
    kernel = bilinear_kernel(jax.random.key(0), (4, 3, 2, 2))
    expected = np.outer([0.25, 0.75, 0.75, 0.25], [0.5, 1, 0.5])
    np.testing.assert_allclose(kernel[:, :, 0, 0], expected)
    np.testing.assert_allclose(kernel[:, :, 1, 1], expected)
    np.testing.assert_array_equal(kernel[:, :, 0, 1], 0)


@pytest.mark.parametrize("method", METHODS)
def test_dtype(method):
    x = jnp.asarray(image(1, 3, 3, 2))
    model = Upsample(2, method, dtype=jnp.bfloat16)
    out, _ = model.init_with_output(jax.random.key(0), x, (6, 6))
    assert out.dtype == jnp.bfloat16


def test_bad_input():
    x = jnp.zeros((1, 3, 3, 2))
    with pytest.raises(ValueError, match="Upsample: method='cubic' is none of"):
        Upsample(2, "cubic").init(jax.random.key(0), x, (6, 6))
    with pytest.raises(ValueError, match=r"size=\(7, 6\) is more than factor=2 times a map"):
        Upsample(2, "transposed").init(jax.random.key(0), x, (7, 6))
