"""Pooling against torch: values, indices, gradients; pyramids against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxmodels.ops import pooling


def image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def first(x):
    return torch.tensor(x, requires_grad=True).permute(0, 3, 1, 2)


def check(ours, theirs, *arrays):
    """Values and gradients of functions of channels-last and channels-first images."""
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = theirs(*(t.permute(0, 3, 1, 2) for t in tensors)).permute(0, 2, 3, 1)
    g = image(*expected.shape, seed=1)
    gradients = torch.autograd.grad(expected, tensors, torch.tensor(g))

    @jax.jit
    def both(g, *arrays):
        out, pull_back = jax.vjp(ours, *arrays)
        return out, *pull_back(g)

    for got, want in zip(both(g, *arrays), (expected, *gradients), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5, atol=1e-6)


WINDOWS = pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": (4, 5), "stride": (3, 2), "padding": 2},
        {"kernel_size": (1, 3), "stride": 3, "padding": (0, 1)},
    ],
)


@WINDOWS
def test_max_pool(options):
    x = image(2, 7, 9, 3)
    check(
        lambda x: pooling.max_pool(x, **options), lambda x: functional.max_pool2d(x, **options), x
    )


@WINDOWS
def test_max_pool_with_indices(options):
    # Few distinct values: of equal ones torch takes the first, and so do we.
    x = np.random.default_rng(0).integers(0, 3, (2, 7, 9, 3)).astype(np.float32)
    ours = jax.jit(lambda x: pooling.max_pool(x, return_indices=True, **options))(x)
    theirs = functional.max_pool2d(first(x), return_indices=True, **options)
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(got, want.permute(0, 2, 3, 1).detach())
    pool = lambda x: functional.max_pool2d(x, **options)  # noqa: E731
    check(lambda x: pooling.max_pool(x, return_indices=True, **options)[0], pool, x)
    check(lambda x: pooling.max_pool(x, **options), pool, x)


@pytest.mark.parametrize("size", [(8, 6), (9, 7)])
def test_max_unpool(size):
    x, other = image(2, *size, 3), image(2, size[0] // 2, size[1] // 2, 3, seed=2)
    indices = jax.jit(lambda x: pooling.max_pool(x, 2, return_indices=True)[1])(x)
    _, theirs = functional.max_pool2d(first(x), 2, return_indices=True)
    check(
        lambda v: pooling.max_unpool(v, indices, size),
        lambda v: functional.max_unpool2d(v, theirs, 2, output_size=size),
        other,
    )


@WINDOWS
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool(options, count_include_pad):
    options = options | {"count_include_pad": count_include_pad}
    x = image(2, 7, 9, 3)
    check(
        lambda x: pooling.avg_pool(x, **options), lambda x: functional.avg_pool2d(x, **options), x
    )


@pytest.mark.parametrize(("size", "bins"), [((7, 9), (3, 5)), ((2, 8), (5, 4)), ((5, 1), (1, 3))])
def test_adaptive_pools(size, bins):
    x = image(2, *size, 3)
    for ours, theirs in (
        (pooling.adaptive_avg_pool, functional.adaptive_avg_pool2d),
        (pooling.adaptive_max_pool, functional.adaptive_max_pool2d),
    ):
        check(lambda x, f=ours: f(x, bins), lambda x, f=theirs: f(x, bins), x)


@pytest.mark.parametrize("size", [(13, 7), (5, 11), (1, 2)])
def test_pyramid_of_any_size(size):
    x = image(2, *size, 3)
    levels = (1, 3, 2)
    expected = [
        functional.adaptive_max_pool2d(first(x), n).permute(0, 2, 3, 1).reshape(2, -1)
        for n in levels
    ]
    out = pooling.spatial_pyramid_pooling(jnp.asarray(x), levels)
    np.testing.assert_array_equal(out, torch.cat(expected, 1).detach())
    assert pooling.spatial_pyramid_pooling(jnp.asarray(x)).shape == (2, 3 * (1 + 4 + 16))


def test_vmap_and_low_precision():
    x = jnp.asarray(image(3, 2, 5, 7, 3))
    for function in (pooling.max_pool, pooling.avg_pool, pooling.adaptive_avg_pool):
        many = jax.vmap(lambda x, f=function: f(x, 2))(x)
        np.testing.assert_array_equal(many[1], function(x[1], 2))
    wide = jnp.full((1, 32, 32, 1), 1.0, jnp.bfloat16).at[:, 0, 0].set(1024.0)
    for mean in (pooling.avg_pool(wide, 32), pooling.adaptive_avg_pool(wide, 1)):
        assert mean.dtype == jnp.bfloat16
        assert mean.item() == 2.0  # (1024 + 1023) / 1024; summed in bfloat16 it is 1
    assert pooling.max_pool(wide, 2).dtype == jnp.bfloat16


def test_nan_is_the_maximum_as_in_torch():
    x = image(1, 5, 7, 2)
    x[0, 2, 3, 0] = x[0, 0, 0, 1] = x[0, 4, 6, 1] = np.nan
    expected = functional.max_pool2d(first(x), 3, 2, 1).permute(0, 2, 3, 1).detach()
    np.testing.assert_array_equal(
        pooling.max_pool(jnp.asarray(x), 3, stride=2, padding=1), expected
    )


def test_bad_input():
    x = jnp.zeros((2, 5, 7, 3))
    with pytest.raises(ValueError, match="max_pool: padding=2 is more than half of kernel_size=3"):
        pooling.max_pool(x, 3, padding=2)
    with pytest.raises(ValueError, match=r"avg_pool: an image of 5 x 7 pixels .* smaller than the"):
        pooling.avg_pool(x, 6)
    with pytest.raises(ValueError, match="max_pool: stride=0 must be at least 1"):
        pooling.max_pool(x, 2, stride=0)
    with pytest.raises(ValueError, match="adaptive_max_pool: size=0 must be at least 1"):
        pooling.spatial_pyramid_pooling(x, (1, 0))
    with pytest.raises(ValueError, match=r"x of shape \(2, 0, 7, 3\) .* is empty"):
        pooling.adaptive_avg_pool(x[:, :0], 2)
    small, places = jnp.zeros((2, 2, 3, 3)), jnp.full((2, 2, 3, 3), 35)
    with pytest.raises(ValueError, match=r"max_unpool: indices .* the shape of x"):
        pooling.max_unpool(small[:, :1], places, (5, 7))
    with pytest.raises(ValueError, match=r"max_unpool: indices holds 35, outside \[0, 34\]"):
        pooling.max_unpool(small, places, (5, 7))
