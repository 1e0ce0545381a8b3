"""ViT and DINOv2 against transformers with the same weights; heads, mixers, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from weights.torch_models import (
    assert_same_gradients,
    images,
    loaded,
    random_variables,
    randomised,
    to_torch,
)

import jaxmodels
from jaxmodels.layers.attention_pool import AttentionPool
from jaxmodels.layers.drop_path import DropPath
from jaxmodels.layers.positions import NoPositions
from jaxmodels.models.vision.vit import VisionTransformer

SIZES = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 5}
SIZES |= {"image_size": 15, "patch_size": 5}
LABELS = {"id2label": {i: str(i) for i in range(7)}}


def torch_vit(**changes):
    config = transformers.ViTConfig(**{**SIZES, "intermediate_size": 31, **LABELS, **changes})
    return randomised(transformers.ViTForImageClassification(config))


def torch_dinov2(**changes):
    config = transformers.Dinov2Config(**{**SIZES, **LABELS, "use_swiglu_ffn": True, **changes})
    return randomised(transformers.Dinov2ForImageClassification(config))


def small(**fields):
    sizes = {"width": 20, "depth": 2, "num_heads": 5, "image_size": 15, "patch_size": 5}
    return VisionTransformer(**{**sizes, "num_classes": 7, **fields})


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    theirs = torch_vit()
    return theirs, *loaded(theirs, tmp_path_factory.mktemp("vit"))


@pytest.mark.parametrize("size", [(15, 15), (20, 11)])
def test_vit_is_that_of_transformers(vit, tmp_path, size):
    """The second size interpolates the positions, and does not see its last row of pixels."""
    theirs, model, variables = vit
    x = images(2, *size, 3)

    def output(theirs):
        return theirs(to_torch(x), interpolate_pos_encoding=True).logits

    assert_same_gradients(theirs, output, model, variables, x, tmp_path)


@pytest.mark.parametrize("gated", [True, False])
def test_dinov2_is_that_of_transformers(tmp_path, gated):
    theirs = torch_dinov2(use_swiglu_ffn=gated)
    model, variables = loaded(theirs, tmp_path / "model")
    x = images(2, 10, 25, 3)
    assert_same_gradients(
        theirs, lambda theirs: theirs(to_torch(x)).logits, model, variables, x, tmp_path / "grad"
    )


def test_features_are_the_last_hidden_state(vit):
    theirs, model, variables = vit
    x = images(2, 20, 35, 3)
    ours = jax.jit(lambda x: model.apply(variables, x, method="features"))(x)
    assert ours.keys() == model.feature_strides.keys() == {"tokens"}
    assert model.feature_strides["tokens"] == 5
    with torch.no_grad():
        out = theirs.vit(to_torch(x), interpolate_pos_encoding=True).last_hidden_state
    np.testing.assert_allclose(
        ours["tokens"], out[:, 1:].reshape(2, 4, 7, 20).numpy(), rtol=1e-4, atol=1e-4
    )


def test_hidden_patches_are_those_of_transformers(tmp_path):
    theirs = randomised(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)))
    model, variables = loaded(theirs, tmp_path)
    x, masked = images(2, 15, 15, 3), jnp.arange(18).reshape(2, 9) % 4 == 0
    ours = jax.jit(model.apply)(variables, x, masked=masked)
    with torch.no_grad():
        out = theirs(to_torch(x), bool_masked_pos=torch.tensor(np.asarray(masked))).pooler_output
    np.testing.assert_allclose(ours, out.numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"masked \(2, 8\) must be \(batch, patches\) = \(2, 9\)"):
        model.apply(variables, x, masked=masked[:, :8])
    with pytest.raises(ValueError, match="masked needs the field mask_token=True"):
        small().init(jax.random.key(0), x, masked=masked)


NAMES = {
    f"vit_{size}_patch{patch}_224"
    for size, patches in {
        "tiny": (16,),
        "small": (8, 16, 32),
        "base": (8, 16, 32),
        "large": (14, 16, 32),
        "huge": (14,),
    }.items()
    for patch in patches
}
# Widths, depths and heads of table 1 of ViT; Ti and S of Steiner et al.
PUBLISHED = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
PUBLISHED |= {"large": (1024, 24, 16), "huge": (1280, 32, 16), "giant": (1536, 40, 24)}


def parameters(model):
    x = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_published_sizes_have_as_many_parameters_as_transformers():
    assert {*jaxmodels.list_models("vit_*_patch*")} == NAMES
    for name in sorted(NAMES):
        model = jaxmodels.create_model(name)
        width, depth, heads = PUBLISHED[name.split("_")[1]]
        config = transformers.ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=4 * width, patch_size=int(name.split("patch")[1].split("_")[0]),
            num_labels=1000,
        )  # fmt: skip
        with torch.device("meta"):
            theirs = transformers.ViTForImageClassification(config)
        assert (model.num_heads, model.image_size) == (heads, 224)
        assert parameters(model) == theirs.num_parameters(), name


def test_published_dinov2_have_as_many_parameters_as_transformers():
    assert len(jaxmodels.list_models("dinov2_*")) == 4
    for size in ("small", "base", "large", "giant"):
        model = jaxmodels.create_model(f"dinov2_{size}")
        width, depth, heads = PUBLISHED[size]
        config = transformers.Dinov2Config(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            image_size=518, use_swiglu_ffn=size == "giant",
        )  # fmt: skip
        with torch.device("meta"):
            theirs = transformers.Dinov2Model(config)
        assert parameters(model) == theirs.num_parameters(), size


def test_attention_pool_is_the_head_of_siglip():
    config = transformers.SiglipVisionConfig(
        hidden_size=20, num_attention_heads=5, intermediate_size=80
    )
    theirs = randomised(SiglipMultiheadAttentionPoolingHead(config))
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = {"probe": state["probe"][0]}
    for i, name in enumerate("qkv"):
        part = slice(20 * i, 20 * (i + 1))
        params[name] = {
            "kernel": state["attention.in_proj_weight"][part].T,
            "bias": state["attention.in_proj_bias"][part],
        }
    for ours, name in (("out", "attention.out_proj"), ("up", "mlp.fc1"), ("down", "mlp.fc2")):
        params[ours] = {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}
    params["mlp"] = {name: params.pop(name) for name in ("up", "down")}
    params["norm"] = {"scale": state["layernorm.weight"], "bias": state["layernorm.bias"]}

    x = images(3, 11, 20)
    pool = AttentionPool(num_heads=5)
    initial = jax.eval_shape(pool.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)
    tensor = torch.tensor(np.asarray(x), requires_grad=True)
    theirs(tensor).square().sum().backward()
    value, gradient = jax.jit(
        jax.value_and_grad(lambda x: jnp.square(pool.apply({"params": params}, x)).sum())
    )(x)
    np.testing.assert_allclose(value, theirs(tensor).square().sum().item(), rtol=1e-4)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("pool", "fields"),
    [("mean", {}), ("attention", {}), ("mean", {"num_registers": 2}), ("token", {"pooler": True})],
)
def test_heads(pool, fields):
    """Logits are the head's of what the pool makes of the features; gradients reach all."""
    model, x = small(pool=pool, **fields), images(2, 10, 15, 3)
    variables = random_variables(model, x)

    @jax.jit
    def call(variables):
        bare = {"params": {k: v for k, v in variables["params"].items() if k != "head"}}
        features = model.apply(variables, x, method="features")["tokens"]
        pooled = model.clone(num_classes=0).apply(bare, x)
        return jax.grad(lambda v: jnp.square(model.apply(v, x)).sum())(variables), (
            model.apply(variables, x),
            features,
            pooled,
        )

    gradient, outputs = call(variables)
    logits, features, pooled = (np.asarray(out) for out in outputs)
    params = variables["params"]
    assert features.shape == (2, 2, 3, 20)
    assert ("class_token" in params) == (pool == "token")
    assert len(params["positions"]) == 9 + (pool == "token")
    kernel, bias = (np.asarray(params["head"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(logits, pooled @ kernel + bias, atol=1e-4)
    if pool == "mean":
        np.testing.assert_allclose(pooled, features.mean(axis=(1, 2)), atol=1e-5)
    if fields.get("pooler"):
        assert np.abs(pooled).max() <= 1
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if not leaf.any()
    ]
    assert dead == []


def test_registers_are_seen_and_have_no_place():
    model, x = small(num_registers=2, pool="token", depth=1), images(2, 15, 15, 3)
    variables = random_variables(model, x)
    call = jax.jit(model.apply)
    out = call(variables, x)
    params = variables["params"]
    turned = params | {"registers": params["registers"][::-1]}
    other = params | {"registers": params["registers"] + images(2, 20)}
    np.testing.assert_allclose(call({"params": turned}, x), out, atol=1e-4)
    assert np.abs(call({"params": other}, x) - out).max() > 1e-3


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
def test_any_bidirectional_mixer(mixer, vit):
    """With the weights of the built-in attention, "softmax" is that attention."""
    _, model, variables = vit
    x = images(2, 15, 15, 3)
    options = {"position": NoPositions(), "use_bias": True} if mixer == "softmax" else {}
    mixed = model.clone(mixer=mixer, mixer_options=options)
    if mixer != "softmax":
        out = jax.jit(mixed.apply)(random_variables(mixed, x), x)
        assert out.shape == (2, 7) and jnp.isfinite(out).all()
    else:
        blocks = dict(variables["params"]["blocks"])
        blocks["mixer"] = blocks.pop("attention")
        expected = jax.jit(model.apply)(variables, x)
        out = jax.jit(mixed.apply)({"params": {**variables["params"], "blocks": blocks}}, x)
        np.testing.assert_allclose(out, expected, atol=1e-4)
    with pytest.raises(ValueError, match="causal=False is not defined"):
        jax.eval_shape(small(mixer="gla").init, jax.random.key(0), x)


def test_drop_path_drops_whole_examples():
    x = images(400, 3, 2)
    call = jax.jit(
        lambda rate, key: DropPath().apply({}, x, rate, train=True, rngs={"dropout": key})
    )
    out = np.asarray(call(0.3, jax.random.key(0)))
    kept = np.isclose(out, x / 0.7, atol=1e-6).all(axis=(1, 2))
    assert (kept ^ (out == 0).all(axis=(1, 2))).all()
    assert 0.6 < kept.mean() < 0.8
    assert not np.array_equal(out, call(0.3, jax.random.key(1)))
    np.testing.assert_array_equal(DropPath().apply({}, x, 0.3, train=False), x)
    np.testing.assert_array_equal(DropPath().apply({}, x, 0.0, train=True), x)
    with pytest.raises(ValueError, match=r"rate=1.0 is outside \[0, 1\)"):
        DropPath().apply({}, x, 1.0, train=True)


def test_training_drops_and_evaluation_does_not():
    """The first block is never dropped, the last with the full rate."""
    model, x = small(depth=2, drop_path=0.5), jnp.repeat(images(1, 15, 15, 3), 64, axis=0)
    variables = random_variables(model, x)
    train = jax.jit(
        lambda m, key: m.apply(variables, x, train=True, rngs={"dropout": key}), static_argnums=0
    )
    out = train(model, jax.random.key(1))
    kinds = len(np.unique(np.round(np.asarray(out), 3), axis=0))
    assert kinds == 4, "with and without each half of the last block"
    np.testing.assert_allclose(
        train(model.clone(drop_path=0.0), jax.random.key(1)),
        jax.jit(model.apply)(variables, x),
        atol=1e-4,
    )
    noisy = train(model.clone(drop_path=0.0, dropout=0.5), jax.random.key(1))
    assert len(np.unique(np.round(np.asarray(noisy), 3), axis=0)) == 64


def test_bfloat16_is_near_float32(vit):
    _, model, variables = vit
    x = images(2, 15, 15, 3)
    expected = np.asarray(jax.jit(model.apply)(variables, x))
    out = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, x)
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(np.float32) - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (2, 3, 15, 15), r"\(2, 3, 15, 15\) are not \(B, Y, X, 3\).*looks like channels first"),
        ({}, (2, 15, 15, 4), r"not \(B, Y, X, 3\), channels last with in_channels=3\n"),
        ({}, (2, 15, 4, 3), "15 x 4 pixels are smaller than one patch of 5 x 5"),
        ({"pool": "cls"}, (2, 15, 15, 3), r"pool='cls' is none of \['attention', 'mean'"),
        ({"num_heads": 3}, (2, 15, 15, 3), "num_heads=3 does not divide width=20"),
        ({"image_size": 4}, (2, 15, 15, 3), "image_size=4 is smaller than one patch"),
        ({"drop_path": 1.0}, (2, 15, 15, 3), r"drop_path=1.0 is outside \[0, 1\)"),
    ],
)
def test_bad_input(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(small(**fields).init, jax.random.key(0), jnp.zeros(shape))
