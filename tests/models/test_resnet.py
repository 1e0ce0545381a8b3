"""ResNet against transformers with the same weights, in evaluation and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from weights.torch_models import (
    assert_same_gradients,
    images,
    loaded,
    random_variables,
    randomised,
    to_torch,
)

import jaxmodels
from jaxmodels.models.vision.resnet import ResidualBlock, ResNet

LABELS = {"id2label": {i: str(i) for i in range(7)}}
KINDS = {
    "basic": {"layer_type": "basic"},
    "v1": {"layer_type": "bottleneck", "downsample_in_bottleneck": True},
    "v1.5": {"layer_type": "bottleneck"},
}


def torch_resnet(kind):
    """The first stage of "basic" has no projection, as that of ResNet-18."""
    widths = [8, 12, 20] if kind == "basic" else [20, 28, 44]
    sizes = {"embedding_size": 8, "hidden_sizes": widths, "depths": [1, 2, 1]}
    config = transformers.ResNetConfig(**sizes, **LABELS, **KINDS[kind])
    return randomised(transformers.ResNetForImageClassification(config))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    theirs = torch_resnet(request.param)
    return theirs, *loaded(theirs, tmp_path_factory.mktemp("resnet"))


def test_values_and_gradients_are_those_of_transformers(pair, tmp_path):
    theirs, model, variables = pair
    x = images(2, 37, 45, 3)
    assert_same_gradients(
        theirs, lambda theirs: theirs(to_torch(x)).logits, model, variables, x, tmp_path
    )


def test_features_are_the_hidden_states(pair):
    theirs, model, variables = pair
    x = images(2, 45, 37, 3)
    maps = jax.jit(lambda x: model.apply(variables, x, method="features"))(x)
    with torch.no_grad():
        states = theirs(to_torch(x), output_hidden_states=True).hidden_states[1:]
    assert model.feature_strides == {"C2": 4, "C3": 8, "C4": 16}
    for (name, ours), state in zip(maps.items(), states, strict=True):
        assert ours.shape[1] == -(-45 // model.feature_strides[name])
        np.testing.assert_allclose(
            np.moveaxis(np.asarray(ours), -1, 1), state.numpy(), rtol=1e-4, atol=1e-4
        )


def test_training_normalises_by_the_batch_and_updates_the_averages_as_torch(tmp_path):
    """Flax' momentum 0.9 is torch's 0.1; torch's running variance is the unbiased one."""
    theirs = torch_resnet("v1.5")
    model, variables = loaded(theirs, tmp_path / "before")
    x = images(3, 64, 64, 3)
    ours, updates = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    with torch.no_grad():
        expected = theirs.train()(to_torch(x)).logits
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-3, atol=1e-3)
    _, after = loaded(theirs, tmp_path / "after")
    flat = dict(jax.tree_util.tree_leaves_with_path(updates["batch_stats"]))
    old = dict(jax.tree_util.tree_leaves_with_path(variables["batch_stats"]))
    counts = {"stem_conv": 3 * 32 * 32, "stages_0": 3 * 16 * 16}
    for path, theirs_after in jax.tree_util.tree_leaves_with_path(after["batch_stats"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = flat[path]
        if name.endswith("var"):
            count = next((n for start, n in counts.items() if name.startswith(start)), None)
            if count is None:
                continue
            change = found - 0.9 * old[path]
            found = 0.9 * old[path] + change * count / (count - 1)
        np.testing.assert_allclose(found, theirs_after, rtol=1e-4, atol=1e-4, err_msg=name)


def test_frozen_statistics_and_scales_do_not_train(tmp_path):
    theirs = torch_resnet("basic")
    model, variables = loaded(theirs, tmp_path, norm="frozen")
    x = images(2, 37, 45, 3)

    def loss(params):
        out, updates = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.square(out).sum(), (out, updates)

    gradient, (out, updates) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    with torch.no_grad():
        np.testing.assert_allclose(out, theirs(to_torch(x)).logits.numpy(), rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.any() == ("norm" not in name), name


def test_dilation_computes_the_same_maps_more_finely():
    """Where both have a value they agree: dilation instead of stride only adds places.

    Away from the borders, where the padding differs.
    """
    fields = {"depths": (1, 1, 2, 2), "widths": (8, 8, 12, 12), "stem_width": 4, "num_classes": 0}
    model = ResNet(**fields)
    fine = model.clone(output_stride=8)
    x = images(1, 257, 257, 3)
    variables = random_variables(model, x)
    coarse_maps, fine_maps = jax.jit(
        lambda x: [each.apply(variables, x, method="features") for each in (model, fine)]
    )(x)
    for name, step in {"C2": 1, "C3": 1, "C4": 2, "C5": 4}.items():
        sampled = fine_maps[name][:, ::step, ::step]
        assert sampled.shape == coarse_maps[name].shape
        middle = slice(4, -4)
        expected = np.asarray(coarse_maps[name][:, middle, middle])
        np.testing.assert_allclose(
            sampled[:, middle, middle], expected, rtol=1e-4, atol=1e-4 * expected.max()
        )
    strides = [ResNet((1,) * 4, output_stride=n).feature_strides for n in (8, 16, 32)]
    assert [[*each.values()] for each in strides] == [[4, 8, 8, 8], [4, 8, 16, 16], [4, 8, 16, 32]]


def test_small_image_stem():
    model = ResNet((1, 1), (8, 16), stem="cifar", stem_width=8, num_classes=5, in_channels=1)
    x = images(2, 11, 13, 1)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert variables["params"]["stem_conv"]["conv"]["kernel"].shape == (3, 3, 1, 8)
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, x)
    assert {name: leaf.shape for name, leaf in maps.items()} == {
        "C2": (2, 11, 13, 8),
        "C3": (2, 6, 7, 16),
    }
    assert model.feature_strides == {"C2": 1, "C3": 2}


@pytest.mark.parametrize("bottleneck", [True, False])
def test_blocks_start_as_identities(bottleneck):
    block = ResidualBlock(8, bottleneck)
    x = images(2, 5, 7, 8)
    out, _ = jax.jit(lambda k: block.init_with_output(k, x, train=False))(jax.random.key(0))
    np.testing.assert_array_equal(out, np.maximum(x, 0))


PUBLISHED = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_as_many_parameters_as_transformers(name):
    assert {*jaxmodels.list_models("resnet*")} == {*PUBLISHED}
    kind, depths = PUBLISHED[name]
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(
        layer_type=kind, depths=depths, hidden_sizes=widths, num_labels=1000
    )
    with torch.device("meta"):
        theirs = transformers.ResNetForImageClassification(config)
    model = jaxmodels.create_model(name)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == theirs.num_parameters()


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (2, 3, 32, 32), r"ResNet: images of shape \(2, 3, 32, 32\).*like channels first"),
        ({"stem": "small"}, (2, 32, 32, 3), r"stem='small' is none of \['imagenet', 'cifar'\]"),
        ({"stride_on": "2x2"}, (2, 32, 32, 3), "stride_on='2x2' is none of"),
        ({"output_stride": 4}, (2, 32, 32, 3), r"output_stride=4 is none of \[8, 16, 32\]"),
        ({"norm": "layer"}, (2, 32, 32, 3), "norm='layer' is neither"),
        ({"widths": (8,)}, (2, 32, 32, 3), r"depths=\(1, 1\) and widths=\(8,\) differ in length"),
    ],
)
def test_bad_input(fields, shape, message):
    model = ResNet(**{"depths": (1, 1), "widths": (8, 16), **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
