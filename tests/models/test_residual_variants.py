"""Residual blocks of other convolutions against torch, deformable ResNets against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle

from jaxmodels.models.vision.residual_variants import DeformableResNet, VariantBlock
from jaxmodels.models.vision.resnet import ResNet


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def residual(params, stats, x, train, stride, conv, stride_on="3x3"):
    """A block in torch; `conv` is what its 3 x 3 convolutions take besides a stride."""

    def none(x):
        return x

    def unit(name, x, activation=torch.relu, **options):
        return oracle.conv_norm(params[name], stats[name], x, train, activation, **options)

    shortcut = unit("shortcut", x, none, stride=stride) if "shortcut" in params else x
    if "conv_3" in params:
        early, late = (stride, 1) if stride_on == "1x1" else (1, stride)
        x = unit("conv_2", unit("conv_1", x, stride=early), stride=late, **conv)
        x = unit("conv_3", x, none)
    else:
        x = unit("conv_2", unit("conv_1", x, stride=stride, **conv), none, **conv)
    return torch.relu(x + shortcut)


@pytest.mark.parametrize(
    ("bottleneck", "stride_on", "train"), [(False, "3x3", True), (True, "1x1", False)]
)
def test_blocks_equal_torch(bottleneck, stride_on, train):
    fields = {"project": True, "stride": 2, "stride_on": stride_on, "dilation": 2}
    model = VariantBlock(12, bottleneck, **fields)
    x = image(3, 11, 13, 5)
    variables = oracle.random_variables(model, jnp.asarray(x), train=train)

    def forward(params, stats, x):
        return residual(params, stats, x, train, 2, {"dilation": 2}, stride_on)

    oracle.check(model, variables, forward, x, train=train)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_without_offsets_a_deformable_resnet_is_a_resnet(bottleneck):
    fields = {"depths": (1, 2), "widths": (8, 12), "bottleneck": bottleneck, "stem_width": 5}
    fields |= {"stem": "cifar", "in_channels": 2, "num_classes": 0, "norm": "frozen"}
    plain, model = ResNet(**fields), DeformableResNet(**fields)
    x = jnp.asarray(image(2, 9, 11, 2))
    given = oracle.random_variables(plain, x)
    fresh = jax.jit(model.init)(jax.random.key(0), x)
    assert model.feature_strides == plain.feature_strides

    def put(path, leaf):
        """The ResNet's weights where it has any; what is left are the offsets of zero."""
        keys = [part.key for part in path]
        if "offsets" in keys:
            assert keys[1] in ("stages_1_0", "stages_1_1") and not np.asarray(leaf).any()
            return leaf
        found = given
        for key in keys:
            found = found[key]
        return found

    variables = jax.tree_util.tree_map_with_path(put, fresh)
    offsets = [p for p, _ in jax.tree_util.tree_leaves_with_path(variables) if "offsets" in str(p)]
    assert len(offsets) == 2 * (2 if bottleneck else 4)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.3 if "offsets" in str(path) else leaf, variables
    )

    @jax.jit
    def maps(variables, moved):
        ours = (model.apply(each, x, method="features") for each in (variables, moved))
        return *ours, plain.apply(given, x, method="features")

    ours, other, expected = maps(variables, moved)
    for name in ("C2", "C3"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other["C2"], ours["C2"], rtol=1e-5, atol=1e-6)
    assert np.abs(other["C3"] - ours["C3"]).max() > 1e-2
