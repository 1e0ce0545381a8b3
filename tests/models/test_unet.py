"""U-Net against its composition in torch, for every way up and any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from torch.nn import functional

import jaxmodels
from jaxmodels.models.vision.unet import UNet


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def double(params, stats, x, train):
    for name in ("conv_0", "conv_1"):
        if "norm" in params[name]:
            x = oracle.conv_norm(params[name], stats[name], x, train)
        else:
            x = torch.relu(oracle.conv(params[name]["conv"], x))
    return x


def rise(params, x, method, places):
    if method == "transposed":
        return oracle.transposed(params["up"], x, stride=2)
    x = oracle.conv(params["halve"], x)
    if method == "max_unpool":
        return functional.max_unpool2d(x, places, 2)
    if method == "pixel_shuffle":
        return functional.pixel_shuffle(oracle.conv(params["up"]["shuffled"], x), 2)
    return functional.interpolate(x, scale_factor=2, mode=method)


@pytest.mark.parametrize(
    ("method", "norm", "train"),
    [
        ("transposed", "batch", True),
        ("transposed", None, False),
        ("nearest", "batch", False),
        ("bilinear", None, True),
        ("pixel_shuffle", "batch", False),
        ("max_unpool", "batch", False),
    ],
)
def test_equals_torch(method, norm, train):
    x = image(2, 11, 14, 3)
    model = UNet(num_classes=5, width=4, depth=2, upsampling=method, norm=norm)
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        stats = stats or {name: None for name in params}
        # Replication by hand: 11 x 14 becomes 12 x 16.
        h, bridges = functional.pad(x, (0, 2, 0, 1), mode="replicate"), []
        for name in ("down_0", "down_1"):
            h = double(params[name], stats[name], h, train)
            pooled, places = functional.max_pool2d(h, 2, return_indices=True)
            bridges.append((h, places))
            h = pooled
        h = double(params["down_2"], stats["down_2"], h, train)
        for level in (1, 0):
            bridge, places = bridges[level]
            h = torch.cat([bridge, rise(params[f"rise_{level}"], h, method, places)], 1)
            h = double(params[f"up_{level}"], stats[f"up_{level}"], h, train)
        return oracle.conv(params["classify"], h)[:, :, :11, :14]

    oracle.check(model, variables, forward, x, train=train)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 7)])
def test_any_size(size):
    model = UNet(num_classes=3, width=2, depth=3)
    x = jnp.asarray(image(2, *size, 3))
    out, _ = jax.jit(model.init_with_output)(jax.random.key(0), x)
    assert out.shape == (2, *size, 3)
    assert np.isfinite(out).all()


def test_published_size():
    """Figure 1: channels 64 to 1024, 23 convolutions; without norm as published."""
    model = jaxmodels.create_model("unet", in_channels=1, norm=None)
    x = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    kernels = [p.shape for p in jax.tree.leaves(params) if len(p.shape) == 4]
    assert len(kernels) == 23
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 31_030_658
    assert params["down_4"]["conv_1"]["conv"]["kernel"].shape == (3, 3, 1024, 1024)


def test_bad_input():
    x = jnp.zeros((2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"UNet: images of shape \(2, 3, 8, 8\).*channels first"):
        UNet().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="Upsample: method='cubic' is none of"):
        jax.eval_shape(
            UNet(width=2, depth=1, upsampling="cubic").init,
            jax.random.key(0),
            jnp.zeros((1, 8, 8, 3)),
        )
