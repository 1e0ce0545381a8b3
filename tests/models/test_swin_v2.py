"""Swin v2 against transformers with the same weights, at any size."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from weights.torch_models import assert_same_gradients, images, loaded, randomised, to_torch

import jaxmodels
from jaxmodels.models.vision.swin_v2 import SwinTransformerV2

LABELS = {"id2label": {i: str(i) for i in range(7)}}


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """Of 24 pixels in patches of 2, the second stage has 6 x 6: shifted windows of 4 in both."""
    config = transformers.Swinv2Config(
        embed_dim=6, depths=[2, 2], num_heads=[2, 3], window_size=4, patch_size=2, mlp_ratio=2.5,
        image_size=24, pretrained_window_sizes=[3, 0], **LABELS,
    )  # fmt: skip
    theirs = randomised(transformers.Swinv2ForImageClassification(config))
    return theirs, *loaded(theirs, tmp_path_factory.mktemp("swinv2"))


@pytest.mark.parametrize("size", [(24, 24), (17, 29)])
def test_values_and_gradients_are_those_of_transformers(swin, tmp_path, size):
    theirs, model, variables = swin
    x = images(2, *size, 3)
    assert_same_gradients(
        theirs, lambda theirs: theirs(to_torch(x)).logits, model, variables, x, tmp_path
    )


def test_features_are_the_maps_before_merging(swin):
    theirs, model, variables = swin
    x = images(2, 29, 17, 3)
    maps = jax.jit(lambda x: model.apply(variables, x, method="features"))(x)
    with torch.no_grad():
        embedded, size = theirs.swinv2.embeddings(to_torch(x))
        stages = theirs.swinv2.encoder(
            embedded, size, output_hidden_states=True, output_hidden_states_before_downsampling=True
        )
        last = theirs.swinv2(to_torch(x)).last_hidden_state
    first = stages.reshaped_hidden_states[1].numpy()
    np.testing.assert_allclose(np.moveaxis(np.asarray(maps["C2"]), -1, 1), first, atol=1e-4)
    np.testing.assert_allclose(maps["C3"], last.reshape(maps["C3"].shape).numpy(), atol=1e-4)


def test_windows_are_no_larger_than_the_maps(tmp_path):
    """At 16 pixels in patches of 2 the last stage is one window of 2 x 2, without shift."""
    config = transformers.Swinv2Config(
        embed_dim=4, depths=[1, 1, 2], num_heads=[2, 2, 2], window_size=4, patch_size=2,
        image_size=16, **LABELS,
    )  # fmt: skip
    theirs = randomised(transformers.Swinv2ForImageClassification(config))
    model, variables = loaded(theirs, tmp_path)
    for size in (16, 24):
        x = images(2, size, size, 3)
        with torch.no_grad():
            expected = theirs(to_torch(x)).logits.numpy()
        np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, atol=1e-4)


def test_cosines_are_scaled_by_a_hundred_at_most(swin, tmp_path):
    """Rounding grows with the scale, hence the wider tolerance."""
    theirs = copy.deepcopy(swin[0])
    for stage in theirs.swinv2.encoder.layers:
        stage.blocks[0].attention.self.logit_scale.data[1] = 6.0
    model, variables = loaded(theirs, tmp_path)
    x = images(2, 24, 24, 3)
    with torch.no_grad():
        expected = theirs(to_torch(x)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, atol=1e-3)


def test_a_window_may_be_changed_after_training(swin):
    """The bias is a function of the offset, so the same parameters serve other windows."""
    _, model, variables = swin
    x = images(2, 24, 24, 3)
    wider = model.clone(window=6, trained_windows=(3, 4))
    out = jax.jit(wider.apply)(variables, x)
    assert jnp.isfinite(out).all()
    assert jnp.abs(out - jax.jit(model.apply)(variables, x)).max() > 1e-3


def test_published_sizes_have_as_many_parameters_as_transformers():
    sizes = {
        "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
        "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
        "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
        "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
    }
    names = jaxmodels.list_models("swinv2_*")
    assert len(names) == 8
    for name in names:
        width, depths, heads = sizes[name.split("_")[1]]
        window = 8 if "window8" in name else 16
        model = jaxmodels.create_model(name)
        assert model.window == window
        assert model.trained_windows == ((12, 12, 12, 6) if "to16" in name else (0, 0, 0, 0))
        if name.startswith("swinv2_small") or "window16" in name:
            continue  # tracing takes seconds, and these only differ in depth or window
        config = transformers.Swinv2Config(
            embed_dim=width, depths=depths, num_heads=heads, window_size=window, image_size=256,
            num_labels=1000,
        )  # fmt: skip
        with torch.device("meta"):
            theirs = transformers.Swinv2ForImageClassification(config)
        x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs.num_parameters(), name


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (2, 24, 11, 3), "SwinTransformerV2: .* smaller than one window of 12 x 12"),
        ({"image_size": 4}, (2, 24, 24, 3), "image_size=4 leaves no pixel to the last of 2 stages"),
        ({"trained_windows": (3,)}, (2, 24, 24, 3), "must have one window for each of 2 stages"),
    ],
)
def test_bad_input(fields, shape, message):
    sizes = {"width": 12, "depths": (1, 1), "num_heads": (2, 2), "window": 3, "image_size": 24}
    model = SwinTransformerV2(**{**sizes, **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
