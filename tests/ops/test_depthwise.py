"""Depthwise convolution against torch and against lax, and that the CPU's form is used."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops import depthwise
from jaxmodels.ops.depthwise import depthwise_convolution


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def value_and_gradients(x, kernel, weights, **options):
    out, pull_back = jax.vjp(lambda *a: depthwise_convolution(*a, **options), x, kernel)
    return out, *pull_back(weights)


def torch_value_and_gradients(x, kernel, weights, sides=((0, 0), (0, 0)), **options):
    x = torch.tensor(x, requires_grad=True)
    kernel = torch.tensor(kernel, requires_grad=True)
    image = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (*sides[1], *sides[0]))
    weight = kernel.permute(2, 0, 1)[:, None]
    out = torch.nn.functional.conv2d(image, weight, groups=x.shape[3], **options)
    out = out.permute(0, 2, 3, 1)
    gradients = torch.autograd.grad(out, (x, kernel), torch.tensor(weights(out.shape)))
    return [a.detach().numpy() for a in (out, *gradients)]


def check(x, kernel, **options):
    sides = options.get("padding", ((0, 0), (0, 0)))
    theirs = {key: options[key] for key in ("stride", "dilation") if key in options}
    draw = np.random.default_rng(1)
    cotangent = {}

    def weights(shape):
        cotangent["g"] = draw.normal(size=tuple(shape)).astype(np.float32)
        return cotangent["g"]

    expected = torch_value_and_gradients(x, kernel, weights, sides, **theirs)
    ours = jax.jit(lambda *a: value_and_gradients(*a, **options))(x, kernel, cotangent["g"])
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@settings(deadline=None, max_examples=6)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2),
    size=st.tuples(st.integers(9, 13), st.integers(9, 13)),
)
def test_equals_torch_with_gradients(kernel, stride, dilation, padding, size):
    x, weight = arrays((2, *size, 3), (*kernel, 3))
    check(x, weight, stride=stride, dilation=dilation, padding=padding)


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_longer_than_a_block_of_columns(stride, monkeypatch):
    """The kernel's gradient walks over blocks of columns; the last one hangs over."""
    monkeypatch.setattr(depthwise, "_COLUMNS", 4)
    x, kernel = arrays((2, 5, 23, 3), (3, 5, 3))
    check(x, kernel, stride=(1, stride), dilation=(1, 2), padding=((1, 1), (3, 2)))


@pytest.fixture
def small_cache(monkeypatch):
    """Channels in blocks of two, in passes of six taps."""
    monkeypatch.setattr(depthwise, "_CACHE", 0)
    monkeypatch.setattr(depthwise, "_LANES", 2)
    monkeypatch.setattr(depthwise, "_TAPS", 6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(5, 2), (2, 7), (3, 3)])
@pytest.mark.parametrize("channels", [6, 5])
def test_kernel_that_fills_the_cache(small_cache, channels, size, stride):
    x, kernel = arrays((2, 11, 13, channels), (*size, channels))
    check(x, kernel, stride=(stride, 1), dilation=(1, 2), padding=((1, 1), (3, 2)))
    apply = partial(depthwise_convolution, stride=stride)
    many = jax.vmap(apply, (0, None))(jnp.asarray(x)[:, None], jnp.asarray(kernel))
    np.testing.assert_allclose(many[:, 0], apply(jnp.asarray(x), jnp.asarray(kernel)), atol=1e-6)


def test_kernel_that_fills_the_cache_on_a_mesh(small_cache):
    """What devices share stays where it is: to store it anew XLA would gather it."""
    x, kernel = arrays((8, 7, 7, 4), (3, 3, 4))
    alone = depthwise_convolution(jnp.asarray(x), jnp.asarray(kernel))
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        apart = jax.device_put(x, jax.P("data"))
        step = jax.jit(lambda x, kernel: depthwise_convolution(x, kernel))
        assert "all-gather" not in step.lower(apart, kernel).compile().as_text()
        np.testing.assert_allclose(step(apart, kernel), alone, atol=1e-6)


def test_form_of_accelerators_is_the_same(monkeypatch):
    x, kernel = arrays((2, 9, 11, 5), (3, 5, 3 + 2))
    options = {"stride": 2, "padding": (2, 1), "dilation": (1, 2)}
    expected = depthwise_convolution(jnp.asarray(x), jnp.asarray(kernel), **options)
    monkeypatch.setattr(depthwise, "platform", lambda: "gpu")
    grouped = depthwise_convolution(jnp.asarray(x), jnp.asarray(kernel), **options)
    np.testing.assert_allclose(grouped, expected, rtol=1e-5, atol=1e-5)


def test_no_grouped_convolution_on_cpu():
    x, kernel = arrays((1, 7, 7, 5), (3, 3, 5))
    step = jax.jit(jax.grad(lambda x, w: depthwise_convolution(x, w).sum(), argnums=(0, 1)))
    assert "convolution" not in step.lower(x, kernel).as_text()


def test_vmap_and_second_derivative():
    x, kernels = arrays((2, 7, 5, 3), (4, 3, 3, 3))
    many = jax.vmap(lambda w: depthwise_convolution(jnp.asarray(x), w, padding=1))(kernels)
    for out, kernel in zip(many, kernels, strict=True):
        single = depthwise_convolution(jnp.asarray(x), jnp.asarray(kernel), padding=1)
        np.testing.assert_allclose(out, single, rtol=1e-6, atol=1e-6)

    def energy(x):
        return (depthwise_convolution(x, jnp.asarray(kernels[0])) ** 2).sum()

    def directional(x):
        return (jax.grad(energy)(x) * x).sum()

    # The energy is a quadratic form: (gradient . x) = 2 energy, its gradient twice that of energy.
    np.testing.assert_allclose(
        jax.grad(directional)(jnp.asarray(x)), 2 * jax.grad(energy)(jnp.asarray(x)), rtol=1e-4
    )


def test_bfloat16_is_summed_in_float32():
    x = jnp.full((1, 9, 9, 1), 1.0, jnp.bfloat16).at[:, 0, 0].set(256.0)
    kernel = jnp.ones((9, 9, 1), jnp.bfloat16)
    out, pull_back = jax.vjp(depthwise_convolution, x, kernel)
    assert out.dtype == jnp.bfloat16
    assert out.item() == 336  # 256 + 80; added one by one in bfloat16 it stays at 256
    assert {g.dtype for g in pull_back(out)} == {jnp.dtype(jnp.bfloat16)}


def test_bad_shapes():
    x = jnp.zeros((2, 5, 7, 3))
    with pytest.raises(ValueError, match=r"depthwise_convolution: kernel \(3, 3, 2\).* 3 channels"):
        depthwise_convolution(x, jnp.zeros((3, 3, 2)))
    with pytest.raises(ValueError, match=r"5 x 7 pixels .* smaller than the window \(3, 3\)"):
        depthwise_convolution(x, jnp.zeros((3, 3, 3)), dilation=3)
    with pytest.raises(ValueError, match="stride=0 must be at least 1"):
        depthwise_convolution(x, jnp.zeros((3, 3, 3)), stride=0)
    with pytest.raises(ValueError, match="padding=-1 must not be negative"):
        depthwise_convolution(x, jnp.zeros((3, 3, 3)), padding=-1)
