"""Transposed convolution against torch and as the gradient of a convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxmodels.ops import transposed_convolution as module
from jaxmodels.ops.convolution import convolution
from jaxmodels.ops.transposed_convolution import transposed_convolution


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def in_torch(x, kernel, groups=1, **options):
    # Ours: (KY, KX, C / groups, groups of F / groups); theirs (C, F / groups, KY, KX).
    weight = torch.cat([k.permute(2, 3, 0, 1) for k in kernel.chunk(groups, dim=3)])
    out = functional.conv_transpose2d(x.permute(0, 3, 1, 2), weight, groups=groups, **options)
    return out.permute(0, 2, 3, 1)


CASES = [
    {},
    {"stride": 2},
    {"stride": (3, 2), "padding": (2, 1), "output_padding": (2, 1)},
    {"stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)},
    {"stride": 2, "output_padding": (1, 2), "dilation": (1, 3), "padding": (4, 1)},
    {"stride": (2, 1), "padding": 1, "groups": 3},
    {"stride": 5, "output_padding": 4},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("kernel_size", [(3, 2), (2, 5)])
def test_equals_torch_with_gradients(options, kernel_size):
    groups = options.get("groups", 1)
    x, kernel = arrays((2, 5, 7, 2 * groups), (*kernel_size, 2, 5 * groups))
    theirs = [torch.tensor(a, requires_grad=True) for a in (x, kernel)]
    expected = in_torch(*theirs, **options)
    (g,) = arrays(expected.shape, seed=1)
    gradients = torch.autograd.grad(expected, theirs, torch.tensor(g))

    @jax.jit
    def ours(x, kernel, g):
        out, pull_back = jax.vjp(lambda *a: transposed_convolution(*a, **options), x, kernel)
        return out, *pull_back(g)

    for got, want in zip(ours(x, kernel, g), (expected, *gradients), strict=True):
        want = want.detach().numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("options", CASES[:5])
def test_form_of_accelerators_is_the_same(options, monkeypatch):
    x, kernel = map(jnp.asarray, arrays((2, 5, 7, 2), (3, 2, 2, 5)))
    expected = transposed_convolution(x, kernel, **options)
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    plain = transposed_convolution(x, kernel, **options)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)


def test_no_spread_image_on_cpu():
    x, kernel = map(jnp.asarray, arrays((2, 5, 7, 2), (3, 2, 2, 5)))
    step = jax.jit(jax.grad(lambda w: transposed_convolution(x, w, stride=2).sum()))
    assert "lhs_dilate = [2, 2]" not in step.lower(kernel).as_text()


def test_is_the_gradient_of_a_convolution():
    x, kernel, g = map(jnp.asarray, arrays((2, 9, 11, 3), (3, 5, 3, 2), (2, 5, 4, 2)))
    options = {"stride": (2, 3), "padding": (1, 2), "dilation": 1}
    _, pull_back = jax.vjp(lambda x: convolution(x, kernel, **options), x)
    back = transposed_convolution(g, kernel.swapaxes(2, 3), output_padding=(0, 1), **options)
    np.testing.assert_allclose(back, pull_back(g)[0], rtol=1e-5, atol=1e-5)


def test_vmap_and_dtype():
    x, kernels = map(jnp.asarray, arrays((2, 5, 3, 3), (4, 2, 2, 3, 5)))
    many = jax.vmap(lambda w: transposed_convolution(x, w, stride=2))(kernels)
    one = transposed_convolution(x, kernels[1], stride=2)
    np.testing.assert_allclose(many[1], one, rtol=1e-5, atol=1e-5)
    assert transposed_convolution(x.astype(jnp.bfloat16), kernels[0]).dtype == jnp.float32


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ((2, 2, 4, 5), {}, r"takes 4 channels and gives 5, but x of shape \(1, 3, 3, 6\)"),
        ((2, 2, 3, 5), {"groups": 2}, "groups must divide both"),
        ((2, 2, 6, 5), {"stride": 2, "output_padding": 2}, "output_padding=2 must be less"),
        ((2, 2, 6, 5), {"padding": 2}, "padding=2 crops all of an output of 4"),
        ((2, 2, 6, 5), {"padding": -1}, "padding=-1 must be at least 0"),
    ],
)
def test_bad_input(kernel, options, message):
    with pytest.raises(ValueError, match=f"transposed_convolution: .*{message}"):
        transposed_convolution(jnp.zeros((1, 3, 3, 6)), jnp.zeros(kernel), **options)
