"""DeepLab v3 and v3+ against their composition in torch, on a small backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle

import jaxmodels
from jaxmodels.models.vision.deeplab import DeepLabV3, DeepLabV3Plus


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("train", "separable"), [(False, False), (True, True)])
def test_v3_equals_torch(train, separable):
    x = image(5, 23, 29, 3)  # of two images, the norm of a mean is a sign: no gradient to compare
    # Of stride 8, so the rates double.
    model = DeepLabV3(
        oracle.SmallBackbone(), num_classes=7, features=5, rates=(1, 2, 3), separable=separable
    )
    variables = oracle.random_variables(model, jnp.asarray(x))
    unit = oracle.separable if separable else oracle.conv_norm

    def forward(params, stats, x):
        maps = oracle.small_backbone(params["backbone"], stats["backbone"], x, train)
        h = oracle.aspp(params["aspp"], stats["aspp"], maps[2], train, (2, 4, 6), unit)
        return oracle.resized(oracle.conv(params["classify"], h), x.shape[2:])

    oracle.check(model, variables, forward, x, train=train)


@pytest.mark.parametrize(("train", "separable"), [(False, False), (True, True)])
def test_v3_plus_equals_torch(train, separable):
    x = image(5, 23, 29, 3)  # of two images, the norm of a mean is a sign: no gradient to compare
    model = DeepLabV3Plus(
        oracle.SmallBackbone(),
        num_classes=7,
        features=5,
        low_features=2,
        rates=(1, 2, 3),
        separable=separable,
    )
    variables = oracle.random_variables(model, jnp.asarray(x))
    unit = oracle.separable if separable else oracle.conv_norm

    def forward(params, stats, x):
        maps = oracle.small_backbone(params["backbone"], stats["backbone"], x, train)
        low = oracle.conv_norm(params["low"], stats["low"], maps[0], train)
        h = oracle.aspp(params["aspp"], stats["aspp"], maps[2], train, (2, 4, 6), unit)
        h = torch.cat([oracle.resized(h, low.shape[2:]), low], 1)
        for name in ("refine_0", "refine_1"):
            h = unit(params[name], stats[name], h, train)
        return oracle.resized(oracle.conv(params["classify"], h), x.shape[2:])

    oracle.check(model, variables, forward, x, train=train)


@pytest.mark.parametrize("name", ["deeplab_v3_resnet50", "deeplab_v3_plus_resnet50"])
def test_registered(name):
    model = jaxmodels.create_model(name, num_classes=5)
    assert model.backbone.feature_strides == {"C2": 4, "C3": 8, "C4": 16, "C5": 16}
    x = jax.ShapeDtypeStruct((2, 65, 71, 3), jnp.float32)
    assert jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape == (2, 65, 71, 5)


@pytest.mark.parametrize("model", [DeepLabV3, DeepLabV3Plus])
@pytest.mark.parametrize("upsampling", ["nearest", "transposed", "pixel_shuffle"])
def test_other_upsampling(model, upsampling):
    model = model(oracle.SmallBackbone(), num_classes=5, features=4, upsampling=upsampling)
    x = jax.ShapeDtypeStruct((2, 15, 17, 3), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert out.shape == (2, 15, 17, 5)
    learned = [key for key in variables["params"] if key.startswith("upsample")]
    expected = 0 if upsampling == "nearest" else 1 + isinstance(model, DeepLabV3Plus)
    assert len(learned) == expected


def test_frozen_statistics_do_not_move():
    x = jnp.asarray(image(2, 17, 19, 3))
    model = DeepLabV3Plus(oracle.SmallBackbone(), features=5, norm="frozen")
    variables = oracle.random_variables(model, x)
    _, new = jax.jit(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables)
    for part in ("aspp", "low", "refine_0"):
        jax.tree.map(
            np.testing.assert_array_equal,
            new["batch_stats"][part],
            variables["batch_stats"][part],
        )
