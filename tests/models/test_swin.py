"""Swin against transformers with the same weights, at any size; what a window sees."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from weights.torch_models import assert_same_gradients, images, loaded, randomised, to_torch

import jaxmodels
from jaxmodels.models.vision.swin import SwinTransformer

SIZES = {"embed_dim": 6, "depths": [2, 2], "num_heads": [2, 3], "window_size": 3}
SIZES |= {"patch_size": 2, "num_channels": 3, "mlp_ratio": 2.5}
LABELS = {"id2label": {i: str(i) for i in range(7)}}


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    config = transformers.SwinConfig(**SIZES, **LABELS, image_size=24)
    theirs = randomised(transformers.SwinForImageClassification(config))
    return theirs, *loaded(theirs, tmp_path_factory.mktemp("swin"))


@pytest.mark.parametrize("size", [(24, 24), (17, 29)])
def test_values_and_gradients_are_those_of_transformers(swin, tmp_path, size):
    """The second size is padded to patches, to windows and to even sides."""
    theirs, model, variables = swin
    x = images(2, *size, 3)
    assert_same_gradients(
        theirs, lambda theirs: theirs(to_torch(x)).logits, model, variables, x, tmp_path
    )


def test_a_map_of_one_window_is_not_shifted(swin):
    """At 12 pixels the second stage has 3 x 3; theirs never shifts again, hence the copy."""
    theirs, model, variables = swin
    x = images(2, 12, 12, 3)
    with torch.no_grad():
        expected = copy.deepcopy(theirs)(to_torch(x)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, atol=1e-4)


def test_features_are_the_maps_before_merging(swin):
    theirs, model, variables = swin
    x = images(2, 29, 17, 3)
    maps = jax.jit(lambda x: model.apply(variables, x, method="features"))(x)
    with torch.no_grad():
        out = theirs.swin(
            to_torch(x), output_hidden_states=True, output_hidden_states_before_downsampling=True
        )
    assert model.feature_strides == {"C2": 2, "C3": 4}
    first = out.reshaped_hidden_states[1].numpy()
    np.testing.assert_allclose(np.moveaxis(np.asarray(maps["C2"]), -1, 1), first, atol=1e-4)
    last = out.last_hidden_state.reshape(maps["C3"].shape).numpy()
    np.testing.assert_allclose(maps["C3"], last, atol=1e-4)


def test_published_sizes_have_as_many_parameters_as_transformers():
    expected = {
        "swin_tiny_patch4_window7_224": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
        "swin_small_patch4_window7_224": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
        "swin_base_patch4_window7_224": (128, [2, 2, 18, 2], [4, 8, 16, 32], 7),
        "swin_large_patch4_window7_224": (192, [2, 2, 18, 2], [6, 12, 24, 48], 7),
        "swin_base_patch4_window12_384": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
        "swin_large_patch4_window12_384": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
    }
    assert {*jaxmodels.list_models("swin_*")} == {*expected}
    for name, (width, depths, heads, window) in expected.items():
        config = transformers.SwinConfig(
            embed_dim=width, depths=depths, num_heads=heads, window_size=window, num_labels=1000
        )
        with torch.device("meta"):
            theirs = transformers.SwinForImageClassification(config)
        model = jaxmodels.create_model(name)
        x = jax.ShapeDtypeStruct((1, 4 * window, 4 * window, 3), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs.num_parameters(), name


def test_cost_grows_linearly_with_area():
    """The exponent of the floating-point operations that XLA counts, from 64 to 256 pixels."""
    model = SwinTransformer(width=12, depths=(2, 2), num_heads=(2, 2), window=4)
    shape = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), shape)

    def operations(side):
        x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return jax.jit(model.apply).lower(variables, x).cost_analysis()["flops"]

    assert operations(256) / operations(64) == pytest.approx(16, rel=0.05)


def test_training_drops_paths_and_evaluation_does_not(swin):
    _, model, variables = swin
    x = jnp.repeat(images(1, 24, 24, 3), 8, axis=0)
    model = model.clone(drop_path=0.5)
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    one, other = (np.asarray(train(jax.random.key(i))) for i in range(2))
    assert not np.array_equal(one, other)
    assert len(np.unique(np.round(one, 4), axis=0)) > 1
    out = np.asarray(jax.jit(model.apply)(variables, x))
    np.testing.assert_allclose(out, out[:1].repeat(8, axis=0), atol=1e-5)


def test_bfloat16_is_near_float32(swin):
    _, model, variables = swin
    x = images(2, 24, 24, 3)
    expected = np.asarray(jax.jit(model.apply)(variables, x))
    out = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, x)
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(np.float32) - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (2, 3, 24, 24), r"SwinTransformer: images of shape \(2, 3, 24, 24\).*channels first"),
        ({}, (2, 24, 11, 3), "24 x 11 pixels are smaller than one window of 12 x 12"),
        ({"num_heads": (2,)}, (2, 24, 24, 3), r"depths=\(1, 1\) and num_heads=\(2,\) differ"),
        (
            {"num_heads": (2, 5)},
            (2, 24, 24, 3),
            "num_heads=5 does not divide the width 24",
        ),
        ({"drop_path": -0.1}, (2, 24, 24, 3), r"drop_path=-0.1 is outside \[0, 1\)"),
    ],
)
def test_bad_input(fields, shape, message):
    sizes = {"width": 12, "depths": (1, 1), "num_heads": (2, 2), "window": 3}
    model = SwinTransformer(**{**sizes, **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
