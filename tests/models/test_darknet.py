"""Darknet-19, Darknet-53 and Extraction against their composition in torch, same weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from torch.nn import functional

import jaxmodels
from jaxmodels.models.vision.darknet import Darknet
from jaxmodels.models.vision.extraction import Extraction

leaky = partial(functional.leaky_relu, negative_slope=0.1)


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def unit(params, stats, x, train, **options):
    """With batch norm, or with a bias."""
    if "norm" in params:
        return oracle.conv_norm(params, stats, x, train, leaky, **options)
    return leaky(oracle.conv(params["conv"], x, **options))


def block(params, stats, x, train):
    x = unit(params["reduce"], stats.get("reduce"), x, train)
    return unit(params["expand"], stats.get("expand"), x, train)


def classified(params, x):
    return x.mean(dim=(2, 3)) @ params["head"]["kernel"] + params["head"]["bias"]


def check(model, x, maps, *, train):
    """`maps` are in torch; the classifier's output and gradients, and all features, agree."""
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        *_, last = maps(params, stats, x).values()
        # (B, K) to (B, K, 1, 1), which is what the comparison turns.
        return classified(params, last)[:, :, None, None]

    class AsMap(type(model)):
        def __call__(self, images, *, train=False):
            return super().__call__(images, train=train)[:, None, None, :]

    fields = {name: getattr(model, name) for name in jaxmodels.registry.module_fields(model)}
    oracle.check(AsMap(**fields), variables, forward, x, train=train)
    ours = jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, x)
    with torch.no_grad():
        params, stats = (oracle.tensors(variables.get(c, {})) for c in ("params", "batch_stats"))
        theirs = maps(params, stats, oracle.channels_first(torch.tensor(x)), train=False)
    assert {*ours} == {*model.feature_strides} and {*ours} <= {*theirs}
    for name, found in ours.items():
        assert model.feature_strides[name] == 2 ** int(name[1:])
        expected = oracle.channels_last(theirs[name])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("residual", "train"), [(False, True), (True, False)])
def test_darknet_is_that_of_torch(residual, train):
    model = Darknet((0, 1, 2, 1), (3, 10, 6, 14), residual, num_classes=7)

    def maps(params, stats, x, train=train):
        found = {}
        for stage, depth in enumerate(model.depths):
            if stage and not residual:
                x = functional.max_pool2d(x, 2)
            name = f"stages_{stage}_0"
            stride = 2 if residual and stage else 1
            x = unit(params[name], stats[name], x, train, stride=stride)
            for i in range(1, depth + 1):
                name = f"stages_{stage}_{i}"
                out = block(params[name], stats[name], x, train)
                x = x + out if residual else out
            found[f"C{stage}"] = x
        return found

    check(model, images(2, 19, 29, 3), maps, train=train)


def test_extraction_is_that_of_torch():
    model = Extraction((3, 5), ((4, 6), (10,)), in_channels=1, num_classes=7)
    normed = jax.eval_shape(model.clone(norm="batch").init, jax.random.key(0), images(1, 16, 16, 1))
    assert normed["batch_stats"]["stages_0_1"]["expand"]["norm"]["mean"].shape == (6,)

    def maps(params, stats, x, train=True):
        x = unit(params["stem_0"], stats.get("stem_0"), x, train, stride=2)
        x = functional.max_pool2d(x, 2)
        found = {"C2": unit(params["stem_1"], stats.get("stem_1"), x, train)}
        for stage, widths in enumerate(model.widths):
            x = functional.max_pool2d(found[f"C{stage + 2}"], 2)
            for i in range(len(widths)):
                name = f"stages_{stage}_{i}"
                x = block(params[name], stats.get(name, {}), x, train)
            found[f"C{stage + 3}"] = x
        return found

    check(model, images(2, 37, 48, 1), maps, train=True)


# Table 6 of YOLO9000, table 1 of YOLOv3 and figure 3 of YOLO, as (kernel, in, out).
PUBLISHED = {
    "darknet19": [
        *[(3, 3, 32), (3, 32, 64)],
        *[(3, 64, 128), (1, 128, 64), (3, 64, 128)],
        *[(3, 128, 256), (1, 256, 128), (3, 128, 256)],
        *[(3, 256, 512), *[(1, 512, 256), (3, 256, 512)] * 2],
        *[(3, 512, 1024), *[(1, 1024, 512), (3, 512, 1024)] * 2],
    ],
    "darknet53": [
        *[(3, 3, 32), (3, 32, 64), (1, 64, 32), (3, 32, 64)],
        *[(3, 64, 128), *[(1, 128, 64), (3, 64, 128)] * 2],
        *[(3, 128, 256), *[(1, 256, 128), (3, 128, 256)] * 8],
        *[(3, 256, 512), *[(1, 512, 256), (3, 256, 512)] * 8],
        *[(3, 512, 1024), *[(1, 1024, 512), (3, 512, 1024)] * 4],
    ],
    "extraction": [
        *[(7, 3, 64), (3, 64, 192)],
        *[(1, 192, 128), (3, 128, 256), (1, 256, 256), (3, 256, 512)],
        *[(1, 512, 256), (3, 256, 512)] * 4,
        *[(1, 512, 512), (3, 512, 1024)],
        *[(1, 1024, 512), (3, 512, 1024)] * 2,
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    model = jaxmodels.create_model(name)
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    leaves = jax.tree_util.tree_leaves_with_path(shapes["params"])
    found = [leaf.shape[1:] for _, leaf in leaves if len(leaf.shape) == 4]
    assert sorted(found) == sorted(PUBLISHED[name])
    assert shapes["params"]["head"]["kernel"].shape == (1024, 1000)
    maps = jax.eval_shape(partial(model.apply, method="features"), shapes, x)
    assert [*maps] == ["C2", "C3", "C4", "C5"]
    assert maps["C5"].shape == (2, 2, 3, 1024) and maps["C2"].shape[1:3] == (16, 24)


@pytest.mark.parametrize("train", [True, False])
def test_no_classes_gives_the_pooled_features_and_frozen_norms_stand_still(train):
    model = Darknet((0, 1, 0), (3, 4, 6), norm="frozen", num_classes=0)
    x = jnp.asarray(images(2, 8, 8, 3))
    variables = oracle.random_variables(model, x)

    @jax.jit
    def both(variables, x):
        out, state = model.apply(variables, x, train=train, mutable=["batch_stats"])
        return out, state, model.apply(variables, x, method="features")["C2"]

    out, state, last = both(variables, x)
    np.testing.assert_allclose(out, np.asarray(last).mean(axis=(1, 2)), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Darknet((1, 1), (8, 4, 2)), (2, 8, 8, 3), r"depths=\(1, 1\) and widths=\(8, 4, 2\)"),
        (Darknet((0, 0, 0), (2, 2, 2)), (2, 3, 8, 8), r"Darknet: images .* like channels first"),
        (Darknet((0, 0, 0), (2, 2, 2)), (2, 3, 8, 3), "Darknet: images of 3 x 8 pixels"),
        (Extraction(widths=((4,),)), (2, 7, 9, 3), "Extraction: images of 7 x 9 pixels"),
        (Darknet((0,), (2,), norm="layer"), (2, 8, 8, 3), "norm='layer' is neither"),
    ],
)  # fmt: skip
def test_bad_input(model, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
