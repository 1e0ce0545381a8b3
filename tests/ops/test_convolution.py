"""Convolution against torch: values and both gradients, in every form of the CPU."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops import convolution as module
from jaxmodels.ops.convolution import convolution


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def in_torch(x, kernel, *, stride=1, padding=((0, 0), (0, 0)), dilation=1, groups=1):
    image = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (*padding[1], *padding[0]))
    weight = kernel.permute(3, 2, 0, 1)
    out = torch.nn.functional.conv2d(image, weight, stride=stride, dilation=dilation, groups=groups)
    return out.permute(0, 2, 3, 1)


def check(x, kernel, **options):
    theirs = [torch.tensor(a, requires_grad=True) for a in (x, kernel)]
    expected = in_torch(*theirs, **options)
    (g,) = arrays(expected.shape, seed=1)
    gradients = torch.autograd.grad(expected, theirs, torch.tensor(g))

    @jax.jit
    def ours(x, kernel, g):
        out, pull_back = jax.vjp(lambda *a: convolution(*a, **options), x, kernel)
        return out, *pull_back(g)

    for got, want in zip(ours(x, kernel, g), (expected, *gradients), strict=True):
        want = want.detach().numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


OPTIONS = {
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
}


@settings(deadline=None, max_examples=6)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(11, 13), st.integers(11, 13)),
    groups=st.integers(1, 3),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_equals_torch_with_gradients(kernel, size, groups, options):
    x, weight = arrays((2, *size, 2 * groups), (*kernel, 2, 5 * groups))
    check(x, weight, groups=groups, **options)


@pytest.mark.parametrize("channels", [(64, 67), (3, 5)], ids=["wide", "narrow"])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": ((1, 1), (1, 1))}),
        ((2, 3), {"stride": (2, 3), "padding": ((0, 1), (2, 0)), "dilation": (3, 2)}),
        ((4, 1), {"stride": (1, 2), "dilation": (2, 1)}),
        ((1, 2), {"stride": (3, 1), "padding": ((2, 2), (0, 3)), "dilation": (1, 3)}),
    ],
)
def test_both_forms_of_the_cpu_equal_torch_with_gradients(kernel, options, channels):
    x, weight = arrays((2, 11, 13, channels[0]), (*kernel, *channels))
    check(x, weight, **options)


@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 0), (2, 3))])
def test_one_by_one_is_a_matrix_product(padding):
    x, kernel = arrays((3, 7, 11, 5), (1, 1, 5, 2))
    check(x, kernel, stride=(2, 3), padding=padding, dilation=2)


def test_depthwise():
    x, kernel = arrays((2, 7, 9, 5), (3, 2, 1, 5))
    check(x, kernel, stride=2, padding=((1, 0), (2, 1)), dilation=(2, 1), groups=5)


def test_forms_of_the_cpu():
    def text(channels, size, groups=1, features=None):
        x, kernel = arrays(
            (1, 5, 5, channels), (size, size, channels // groups, features or channels)
        )
        image = jnp.asarray(x)
        step = jax.value_and_grad(lambda w: convolution(image, w, groups=groups).sum())
        return jax.jit(step).lower(kernel).as_text()

    assert "convolution" not in text(3, 1)
    assert "convolution" not in text(3, 3, groups=3)
    assert text(6, 3, groups=3).count("stablehlo.convolution") == 2
    assert text(3, 3).count("stablehlo.convolution") == 2
    assert text(64, 2).count("stablehlo.convolution") == 1  # the forward pass alone
    assert text(64, 2, features=32).count("stablehlo.convolution") == 2


@pytest.mark.parametrize("channels", [3, 64])
def test_gradients_on_a_cpu_are_convolutions_that_need_no_rearranging(channels):
    """XLA rearranges none inside of loops and branches, and runs those sixty times slower."""
    x, kernel = map(jnp.asarray, arrays((2, 9, 8, channels), (3, 2, channels, channels)))
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}

    def loss(x, kernel):
        return (convolution(x, kernel, **options) ** 2).sum()

    found = []

    def search(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive is jax.lax.conv_general_dilated_p:
                found.append(equation.params["dimension_numbers"])
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                search(inner)

    search(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernel).jaxpr)
    plain = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    assert found == [plain] * (3 if channels < 64 else 2)


@pytest.mark.parametrize(("channels", "size"), [(3, 1), (64, 2), (5, 3)])
def test_accelerators_take_the_plain_form(channels, size, monkeypatch):
    x, kernel = map(jnp.asarray, arrays((2, 7, 5, channels), (size, size, channels, channels)))
    expected = convolution(x, kernel, stride=2)
    monkeypatch.setattr(module, "platform", lambda: "tpu")
    step = jax.jit(jax.value_and_grad(lambda w: (convolution(x, w, stride=2) ** 2).sum()))
    assert step.lower(kernel).as_text().count("stablehlo.convolution") == 2
    np.testing.assert_allclose(step(kernel)[0], (expected**2).sum(), rtol=1e-5)


def test_padding_may_be_given_in_three_ways():
    x, kernel = map(jnp.asarray, arrays((2, 5, 7, 3), (3, 2, 3, 5)))
    full = convolution(x, kernel, padding=((2, 2), (1, 1)))
    np.testing.assert_array_equal(convolution(x, kernel, padding=(2, 1)), full)
    np.testing.assert_array_equal(convolution(x, kernel, padding=2)[:, :, 1:-1], full)


def test_vmap_over_kernels():
    x, kernels = map(jnp.asarray, arrays((2, 5, 7, 3), (4, 3, 3, 3, 2)))
    many = jax.vmap(lambda w: convolution(x, w))(kernels)
    for out, kernel in zip(many, kernels, strict=True):
        np.testing.assert_allclose(out, convolution(x, kernel), rtol=1e-5, atol=1e-5)


def test_dtype_is_the_wider():
    x, kernel = jnp.ones((1, 3, 3, 2), jnp.bfloat16), jnp.ones((2, 2, 2, 3), jnp.float32)
    assert convolution(x, kernel).dtype == jnp.float32
    assert convolution(x, kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "message"),
    [
        ((2, 5, 7, 4), (3, 3, 3, 6), {}, r"x of shape \(2, 5, 7, 4\) .* has 4 .* takes 3$"),
        ((2, 3, 7, 5), (3, 3, 3, 6), {}, "takes 3; the image looks channels first"),
        ((2, 5, 7, 4), (3, 3, 4, 6), {"groups": 2}, r"groups=2 takes 8"),
        ((2, 5, 7, 4), (3, 3, 2, 5), {"groups": 2}, "groups=2 does not divide the 5 outputs"),
        ((2, 2, 7, 4), (3, 3, 4, 6), {}, "2 x 7 pixels .* is smaller than the window"),
        ((2, 5, 7, 4), (3, 3, 4, 6), {"stride": (1, 0)}, r"stride=\(1, 0\) must be at least 1"),
        ((2, 5, 7, 4), (3, 3, 4, 6), {"dilation": 0}, "dilation=0 must be at least 1"),
        ((2, 5, 7, 4), (3, 3, 4, 6), {"padding": ((0, 0), (0, -1))}, "must not be negative"),
    ],
)
def test_bad_input(shape, kernel, options, message):
    with pytest.raises(ValueError, match=message):
        convolution(jnp.zeros(shape), jnp.zeros(kernel), **options)
