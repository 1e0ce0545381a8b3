"""The unit of segmenters against torch, with and without norm, and separable."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from torch.nn import functional

from jaxmodels.layers.conv_norm import ConvNorm, SeparableConvNorm


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("train", [False, True])
def test_conv_norm(train):
    x = image(2, 7, 11, 6)
    model = ConvNorm(4, (3, 5), dilation=2, groups=2, activation=silu)
    variables = oracle.random_variables(model, jnp.asarray(x), train=train)

    def forward(params, stats, x):
        options = {"activation": functional.silu, "groups": 2, "dilation": 2}
        return oracle.conv_norm(params, stats, x, train, **options)

    oracle.check(model, variables, forward, x, train=train, rtol=1e-5 if not train else 1e-4)


def silu(x):
    return x / (1 + jnp.exp(-x))


def test_without_norm_there_is_a_bias():
    x = image(2, 7, 11, 6)
    model = ConvNorm(4, 3, norm=None)
    variables = oracle.random_variables(model, jnp.asarray(x), train=False)
    assert "batch_stats" not in variables

    def forward(params, stats, x):
        return torch.relu(oracle.conv(params["conv"], x))

    oracle.check(model, variables, forward, x, train=False)


@pytest.mark.parametrize("train", [False, True])
def test_separable(train):
    x = image(2, 7, 11, 6)
    model = SeparableConvNorm(4, 3, dilation=2)
    variables = oracle.random_variables(model, jnp.asarray(x), train=train)
    assert variables["params"]["depthwise"]["conv"]["kernel"].shape == (3, 3, 1, 6)

    def forward(params, stats, x):
        return oracle.separable(params, stats, x, train, dilation=2)

    oracle.check(model, variables, forward, x, train=train)
