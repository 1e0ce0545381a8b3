"""The feature pyramid against its composition in torch, on a small backbone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from torch.nn import functional

from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.vision.resnet import ResNet

LEVELS = ("C1", "C2", "C3")


class Maps(nn.Module):
    """All maps in one array, so that one comparison sees them all."""

    pyramid: nn.Module

    def __call__(self, images, *, train=False):
        maps = self.pyramid(images, train=train)
        return jnp.concatenate([x.reshape(len(x), 1, 1, -1) for x in maps.values()], axis=-1)


def torch_pyramid(extra, norm, train):
    def unit(params, stats, name, x):
        if norm is None:
            return oracle.conv(params[name]["conv"], x)
        return oracle.conv_norm(params[name], stats[name], x, train, activation=lambda y: y)

    def forward(params, stats, x):
        params, stats = params["pyramid"], stats["pyramid"]
        maps = oracle.small_backbone(params["backbone"], stats["backbone"], x, train)
        inner, outs = None, []
        for i in (2, 1, 0):
            lateral = unit(params, stats, f"lateral_{i}", maps[i])
            if inner is not None:
                lateral = lateral + oracle.resized(inner, lateral.shape[2:], "nearest")
            inner = lateral
            outs.insert(0, unit(params, stats, f"output_{i}", inner))
        if extra == "pool":
            outs.append(functional.max_pool2d(outs[-1], 1, 2))
        if extra == "conv":
            outs.append(oracle.conv(params["coarser_0"], outs[-1], stride=2))
            outs.append(oracle.conv(params["coarser_1"], torch.relu(outs[-1]), stride=2))
        flat = [oracle.channels_last(out).flatten(1) for out in outs]
        return torch.cat(flat, 1)[:, :, None, None]

    return forward


@pytest.mark.parametrize(
    ("extra", "norm", "train"), [("pool", None, False), ("conv", "batch", True)]
)
def test_equals_torch(extra, norm, train):
    """At 37 x 29 pixels both steps down are from odd maps."""
    x = np.random.default_rng(0).normal(size=(2, 37, 29, 3)).astype(np.float32)
    model = Maps(FeaturePyramid(oracle.SmallBackbone(), LEVELS, width=7, extra=extra, norm=norm))
    variables = oracle.random_variables(model, jnp.asarray(x))
    oracle.check(model, variables, torch_pyramid(extra, norm, train), x, train=train)


@pytest.mark.parametrize(
    ("extra", "levels", "strides"),
    [
        ("pool", LEVELS, {"P1": 2, "P2": 4, "P3": 8, "P4": 16}),
        ("conv", LEVELS[1:], {"P2": 4, "P3": 8, "P4": 16, "P5": 32}),
        (None, LEVELS[:2], {"P1": 2, "P2": 4}),
    ],
)
def test_names_sizes_and_strides(extra, levels, strides):
    model = FeaturePyramid(oracle.SmallBackbone(), levels, width=5, extra=extra)
    assert model.feature_strides == strides
    images = jax.ShapeDtypeStruct((2, 45, 61, 3), jnp.float32)
    maps, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    sizes = {name: (2, -(-45 // s), -(-61 // s), 5) for name, s in strides.items()}
    assert {name: leaf.shape for name, leaf in maps.items()} == sizes
    assert [*maps] == [*strides]


def test_maps_of_equal_stride_are_added_as_they_are():
    """Of a backbone that dilates: P4 without a part of its own, and P5's output, is P5."""
    backbone = ResNet((1,) * 4, (8,) * 4, stem_width=8, num_classes=0, output_stride=8)
    model = FeaturePyramid(backbone, width=5)
    assert model.feature_strides == {"P2": 4, "P3": 8, "P4": 8, "P5": 8, "P6": 16}
    images = np.random.default_rng(0).normal(size=(1, 33, 33, 3)).astype(np.float32)
    variables = oracle.random_variables(model, jnp.asarray(images))
    params = variables["params"]
    params["lateral_2"] = jax.tree.map(jnp.zeros_like, params["lateral_2"])
    params["output_2"] = params["output_3"]
    maps = jax.jit(lambda x: model.apply(variables, x))(images)
    assert maps["P5"].shape == (1, 5, 5, 5) and maps["P5"].std() > 0.1
    np.testing.assert_allclose(maps["P4"], maps["P5"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ("C2", "C7")}, r"levels \['C7'\] are none of the backbone's \{'C1': 2"),
        ({"extra": "convolution"}, "extra='convolution' is none of 'pool', 'conv' and None"),
    ],
)
def test_bad_input(fields, message):
    model = FeaturePyramid(**{"backbone": oracle.SmallBackbone(), "levels": LEVELS, **fields})
    with pytest.raises(ValueError, match=f"FeaturePyramid: {message}"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
