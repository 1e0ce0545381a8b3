"""Hourglass against its composition in torch, values, gradients and sizes."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from torch.nn import functional

import jaxmodels
from jaxmodels.models.vision.hourglass import Hourglass


def residual(params, stats, x, train, stride=1):
    """conv, norm, relu, conv, norm, plus the input or its projection, relu."""
    block = params, stats
    out = oracle.conv_norm(*(tree["conv_1"] for tree in block), x, train, stride=stride)
    out = oracle.conv_norm(*(tree["conv_2"] for tree in block), out, train, lambda x: x)
    if "shortcut" in params:
        x = oracle.conv_norm(
            *(tree["shortcut"] for tree in block), x, train, lambda x: x, stride=stride
        )
    return torch.relu(out + x)


def hourglass(params, stats, x, train, level=0):
    """The recursion of figure 3: itself, one level smaller, between two rows of blocks."""

    def row(x, name, stride=1):
        count = sum(key.rpartition("_")[0] == name for key in params)
        for i in range(count):
            names = f"{name}_{i}"
            x = residual(params[names], stats[names], x, train, 1 if i else stride)
        return x

    if f"down_{level}_0" not in params:
        return row(x, "bottom")
    below = hourglass(params, stats, row(x, f"down_{level}", 2), train, level + 1)
    up = functional.interpolate(row(below, f"up_{level}"), scale_factor=2, mode="nearest")
    return row(x, f"bridge_{level}") + up[:, :, : x.shape[2], : x.shape[3]]


def stacked(params, stats, x, train):
    def unit(name, x, activation=torch.relu, **options):
        return oracle.conv_norm(params[name], stats[name], x, train, activation, **options)

    def same(x):
        return x

    x = residual(
        params["stem_block"], stats["stem_block"], unit("stem", x, stride=2), train, stride=2
    )
    first = unit("out_0", hourglass(params["hourglass_0"], stats["hourglass_0"], x, train))
    x = torch.relu(unit("keep_1", x, same) + unit("merge_1", first, same))
    x = residual(params["between_1"], stats["between_1"], x, train)
    second = unit("out_1", hourglass(params["hourglass_1"], stats["hourglass_1"], x, train))
    return first, second


class Joined(nn.Module):
    """All maps side by side, so that one comparison sees them all."""

    backbone: nn.Module

    def __call__(self, images, *, train=False):
        return jnp.concatenate([*self.backbone.features(images, train=train).values()], axis=-1)


SMALL = {"widths": (5, 7, 11), "depths": (2, 1, 1), "stem_width": 3}


def test_equals_torch_at_odd_sizes_in_training():
    """Odd sides at every level: 38 x 44 pixels, then 10 x 11, 5 x 6 and 3 x 3."""
    x = np.random.default_rng(0).normal(size=(2, 38, 44, 3)).astype(np.float32)
    model = Joined(Hourglass(**SMALL))
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        return torch.cat(stacked(params["backbone"], stats["backbone"], x, True), 1)

    oracle.check(model, variables, forward, x, train=True, rtol=1e-3)


def test_features_and_strides():
    model = Hourglass(**SMALL, stacks=3, in_channels=1)
    x = jax.ShapeDtypeStruct((2, 41, 63, 1), jnp.float32)
    maps, variables = jax.eval_shape(
        lambda key, x: model.init_with_output(key, x, method="features"), jax.random.key(0), x
    )
    assert {name: leaf.shape for name, leaf in maps.items()} == {
        f"stack_{i}": (2, 11, 16, 5) for i in range(3)
    }
    assert model.feature_strides == dict.fromkeys(maps, 4)
    last = jax.eval_shape(model.apply, variables, x)
    assert last.shape == (2, 11, 16, 5)


def torch_residual(c, d, stride=1):
    layers = [torch.nn.Conv2d(c, d, 3, stride, bias=False), torch.nn.BatchNorm2d(d)]
    layers += [torch.nn.Conv2d(d, d, 3, bias=False), torch.nn.BatchNorm2d(d)]
    if c != d or stride != 1:
        layers += [torch.nn.Conv2d(c, d, 1, bias=False), torch.nn.BatchNorm2d(d)]
    return layers


def test_hourglass104_has_the_published_size():
    """Counted with the modules of section 3.5, level by level."""

    def unit(c, d, size):
        return [torch.nn.Conv2d(c, d, size, bias=False), torch.nn.BatchNorm2d(d)]

    layers = [*unit(3, 128, 7), *torch_residual(128, 256, 2)]
    widths = [256, 256, 384, 384, 384, 512]
    for _ in range(2):
        for above, below in itertools.pairwise(widths):
            layers += 2 * torch_residual(above, above)  # the bridge
            layers += [*torch_residual(above, below, 2), *torch_residual(below, below)]
            layers += [*torch_residual(below, below), *torch_residual(below, above)]
        layers += 4 * torch_residual(512, 512) + unit(256, 256, 3)
    layers += 2 * unit(256, 256, 1) + torch_residual(256, 256)
    count = sum(weight.numel() for layer in layers for weight in layer.parameters())
    model = jaxmodels.create_model("hourglass104")
    x = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert model.stacks == 2


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"depths": (1, 2)}, (2, 32, 32, 3), r"Hourglass: widths=.* differ in length"),
        ({"stacks": 0}, (2, 32, 32, 3), "stacks=0 .* must be at least 1"),
        ({"depths": (1, 0, 1)}, (2, 32, 32, 3), r"depths=\(1, 0, 1\) must be at least 1"),
        ({}, (2, 3, 32, 32), r"Hourglass: images of shape .*like channels first"),
    ],
)
def test_bad_input(fields, shape, message):
    model = Hourglass(**{**SMALL, **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
