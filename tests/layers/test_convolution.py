"""Conv and ConvTranspose against torch's modules with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle

from jaxmodels.layers.convolution import Conv, ConvTranspose


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def check(model, theirs, x):
    variables = oracle.random_variables(model, jnp.asarray(x))
    params = oracle.tensors(variables["params"])
    axes = (3, 2, 0, 1) if isinstance(model, Conv) else (2, 3, 0, 1)
    theirs.weight.data = params["kernel"].permute(*axes)
    if "bias" in params:
        theirs.bias.data = params["bias"]
    expected = oracle.channels_last(theirs(oracle.channels_first(torch.tensor(x))))
    out = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"kernel_size": 3}, {"kernel_size": 3, "padding": 1}),
        (
            {"kernel_size": (5, 2), "stride": (1, 2), "dilation": (2, 3)},
            {"kernel_size": (5, 2), "stride": (1, 2), "dilation": (2, 3), "padding": (4, 1)},
        ),
        ({"kernel_size": 3, "padding": 0, "groups": 2}, {"kernel_size": 3, "groups": 2}),
        ({"kernel_size": 1, "use_bias": False}, {"kernel_size": 1, "bias": False}),
        ({"kernel_size": 3, "groups": 6}, {"kernel_size": 3, "padding": 1, "groups": 6}),
    ],
)
def test_conv(ours, theirs):
    check(Conv(6, **ours), torch.nn.Conv2d(6, 6, **theirs), image(2, 11, 9, 6))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"kernel_size": 2, "stride": 2}, {"kernel_size": 2, "stride": 2}),
        ({"kernel_size": 4, "stride": 2}, {"kernel_size": 4, "stride": 2, "padding": 1}),
        (
            {"kernel_size": 3, "stride": (2, 1), "use_bias": False},
            {"kernel_size": 3, "stride": (2, 1), "padding": 1, "output_padding": (1, 0),
             "bias": False},
        ),
        (
            {"kernel_size": 2, "stride": (5, 3), "dilation": 2, "padding": (0, 1)},
            {"kernel_size": 2, "stride": (5, 3), "dilation": 2, "padding": (0, 1)},
        ),
    ],
)  # fmt: skip
def test_conv_transpose(ours, theirs):
    check(ConvTranspose(5, **ours), torch.nn.ConvTranspose2d(6, 5, **theirs), image(2, 7, 3, 6))


@pytest.mark.parametrize(
    ("kernel_size", "stride"), [(1, 1), (3, 1), (1, 2), (2, 2), (3, 2), (4, 2), (2, 3), (4, 3)]
)
def test_default_padding_multiplies_the_size_by_the_stride(kernel_size, stride):
    model = ConvTranspose(2, kernel_size, stride=stride)
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 5, 7, 3)))
    assert out.shape == (1, 5 * stride, 7 * stride, 2)


def test_parameters_are_float32_and_computation_is_not():
    x = jnp.asarray(image(1, 5, 5, 3))
    for model in (
        Conv(2, 3, dtype=jnp.bfloat16),
        ConvTranspose(2, 2, stride=2, dtype=jnp.bfloat16),
    ):
        out, variables = model.init_with_output(jax.random.key(0), x)
        assert out.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_initial_kernel_keeps_the_variance_under_relu():
    """He's: variance 2 / (inputs of one output)."""
    model = Conv(64, 3, groups=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3, 3, 64)))["params"]
    assert params["kernel"].shape == (3, 3, 32, 64)
    assert np.var(params["kernel"]) == pytest.approx(2 / (9 * 32), rel=0.05)
    np.testing.assert_array_equal(params["bias"], 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Conv(4, 3, groups=2),
            r"Conv: groups=2 does not divide the 3 channels of x.*channels last",
        ),
        (Conv(4, 0), "Conv: kernel_size=0 must be at least 1"),
        (ConvTranspose(4, 3, groups=2), "ConvTranspose: groups=2 does not divide the 3 channels"),
        (ConvTranspose(4, 2), "output_padding=1 must be less than stride=1"),
        (ConvTranspose(4, 3, output_padding=1), "output_padding=1 needs a padding"),
    ],
)
def test_bad_fields(model, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros((1, 5, 5, 3)))
