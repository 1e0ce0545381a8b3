"""Patch embedding against torch's strided convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.layers.patch_embed import PatchEmbed


def test_equals_a_strided_convolution():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 11, kernel_size=3, stride=3)
    x = np.random.default_rng(0).normal(size=(2, 6, 21, 5)).astype(np.float32)
    image = torch.tensor(x, requires_grad=True)
    expected = conv(image.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    expected.square().sum().backward()

    kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0).reshape(45, 11)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(conv.bias.detach().numpy())}
    layer = PatchEmbed(width=11, patch_size=3)

    def loss(x):
        out = layer.apply({"params": {"project": params}}, x)
        return jnp.square(out).sum(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(x))
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, image.grad, rtol=1e-4, atol=1e-4)


def test_bad_size():
    with pytest.raises(ValueError, match="patch_size=3 does not divide an image of 7 x 6"):
        PatchEmbed(width=11, patch_size=3).init(jax.random.key(0), jnp.zeros((7, 6, 5)))
