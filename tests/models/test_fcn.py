"""FCN against its composition in torch, on a small backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_layers as oracle
from torch.nn import functional

import jaxmodels
from jaxmodels.models.vision.fcn import FCN


def image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def upsampled(params, x, factor, size, method):
    if method in ("nearest", "bilinear"):
        return oracle.resized(x, size, method)
    if method == "transposed":
        x = oracle.transposed(params["transposed"], x, stride=factor, padding=factor // 2)
    else:
        x = functional.pixel_shuffle(oracle.conv(params["shuffled"], x), factor)
    return x[:, :, : size[0], : size[1]]


@pytest.mark.parametrize(
    ("method", "stride", "train"),
    [
        ("transposed", 2, True),
        ("transposed", 8, False),
        ("bilinear", 2, False),
        ("bilinear", 4, True),
        ("nearest", 2, False),
        ("pixel_shuffle", 4, False),
    ],
)
def test_equals_torch(method, stride, train):
    x = image(2, 19, 29, 3)
    model = FCN(oracle.SmallBackbone(), num_classes=7, stride=stride, upsampling=method)
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        def up(name, scores, factor, size):
            return upsampled(params.get(name), scores, factor, size, method)

        backbone = params["backbone"], stats["backbone"]
        maps = oracle.small_backbone(*backbone, x, train)
        scores = oracle.conv(params["score_C3"], maps[2])
        for name, level, own in (("C2", 1, 4), ("C1", 0, 2)):
            if own >= stride:
                scored = oracle.conv(params[f"score_{name}"], maps[level])
                scores = scored + up(f"upsample_{name}", scores, 2, scored.shape[2:])
        return up("upsample", scores, stride, x.shape[2:])

    if stride == 8:  # the unused gradients of torch are None; here all three maps are one chain
        assert set(variables["params"]) == {"backbone", "score_C3", "upsample"}
    oracle.check(model, variables, forward, x, train=train)


def test_starts_with_equal_classes_and_learns():
    x = jnp.asarray(image(1, 16, 16, 3))
    model = FCN(oracle.SmallBackbone(), num_classes=3, stride=2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(model.apply(variables, x), 0)
    stats = variables["batch_stats"]

    def loss(params):
        return model.apply({"params": params, "batch_stats": stats}, x)[..., 0].sum()

    gradient = jax.grad(loss)(variables["params"])
    assert np.abs(gradient["score_C1"]["kernel"]).max() > 0


def test_backbone_without_a_map_that_coarse():
    with pytest.raises(ValueError, match=r"FCN: stride=16 is larger than .* \{'C1': 2"):
        FCN(oracle.SmallBackbone(), stride=16).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_registered():
    model = jaxmodels.create_model("fcn_resnet50", num_classes=5)
    x = jax.ShapeDtypeStruct((2, 65, 71, 3), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert out.shape == (2, 65, 71, 5)
    scores = {name for name in variables["params"] if name.startswith("score")}
    assert scores == {"score_C3", "score_C4", "score_C5"}
    assert jaxmodels.create_model("fcn_resnet101").backbone.depths == (3, 4, 23, 3)
