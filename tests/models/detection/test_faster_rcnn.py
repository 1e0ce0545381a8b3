"""Faster R-CNN as a whole: what its loss sees, what it learns, what it finds.

The parts are compared with the definitions in `test_region_proposals` and
`test_roi_heads`, and the whole with torchvision's layout in `test_torchvision_detection`.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_layers
from models.detection import two_stage
from torch_layers import random_variables

from jaxmodels.data import digit_scenes
from jaxmodels.models.detection import faster_rcnn
from jaxmodels.models.detection.faster_rcnn import FasterRCNN, StageHead, TwoLayerHead
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.vision.resnet import ResNet

CANVAS = (48, 64)
SMALL = {"in_channels": 1, "num_classes": 0, "stem_width": 8, "bottleneck": False}
FEW = {
    "num_classes": 10,
    "candidates": (40, 40),
    "proposals": (30, 20),
    "proposal_samples": 32,
    "region_samples": 16,
    "max_detections": 7,
}
PYRAMID = FasterRCNN(
    FeaturePyramid(ResNet((1, 1, 1), (8, 12, 16), **SMALL), ("C2", "C3", "C4"), width=12),
    proposal_maps=("P2", "P3", "P4", "P5"),
    anchor_sizes=((8,), (16,), (32,), (64,)),
    region_maps=("P2", "P3", "P4"),
    region_size=3,
    canonical_size=56,
    head=TwoLayerHead(24),
    **FEW,
)
SINGLE = FasterRCNN(
    ResNet((1, 1), (8, 12), norm="frozen", **SMALL),
    proposal_maps=("C3",),
    anchor_sizes=((12, 24, 48),),
    proposal_width=9,
    region_maps=("C3",),
    region_size=4,
    pooling="max",
    head=StageHead(16, 1, 2, bottleneck=False),
    **FEW,
)
MODELS = {"pyramid": PYRAMID, "single map": SINGLE}


def scenes(seed=0):
    """Two of them, with all that a batch may have, so that one program takes them all."""
    options = {"size": 2, "canvas": CANVAS, "count": (1, 3), "scale": (1.5, 4.0)}
    data = digit_scenes("train", **options, seed=seed)
    batch = data.batch(np.arange(2), np.random.default_rng(0))
    batch = {name: batch[name] for name in ("image", "boxes", "box_labels")}
    batch["box_ignored"] = np.zeros((2, 3), bool)
    batch["image_size"] = np.array([CANVAS] * 2)
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def compiled(name):
    """The loss with its gradients, and the detections, which may compile once."""
    model = MODELS[name]

    @jax.jit
    def step(variables, batch, key):
        stats = {"batch_stats": variables["batch_stats"]}

        def loss(params):
            total, terms, state = model.loss(params, batch, key, stats)
            return total, (terms, state)

        (total, rest), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return total, *rest, gradient

    return step, jax.jit(chex.assert_max_traces(model.detect, n=1))


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    model = MODELS[request.param]
    variables = random_variables(model, scenes()["image"])
    step, _ = compiled(request.param)
    return model, variables, lambda batch, key: step(variables, batch, jax.random.key(key))


def test_losses_are_finite_and_reach_every_parameter(trained):
    model, variables, step = trained
    total, terms, state, gradient = step(scenes(), 1)
    assert {*terms} == {"proposal_objectness", "proposal_boxes", "roi_classes", "roi_boxes"}
    assert all(jnp.isfinite(value) and value > 0 for value in terms.values())
    np.testing.assert_allclose(total, sum(terms.values()), rtol=1e-6)
    means = [state["batch_stats"]["backbone"], variables["batch_stats"]["backbone"]]
    moved = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, means), strict=True)]
    assert all(moved) if model is PYRAMID else not any(moved)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        frozen = "norm" in name and model is SINGLE
        assert np.asarray(leaf).any() != frozen, name


def test_places_without_a_box_and_ignored_objects(trained):
    """Padding changes nothing; what is ignored teaches nothing, and its class is not read."""
    _, _, step = trained
    batch = scenes()
    there = batch["box_labels"] >= 0
    assert not there.all()
    elsewhere = batch | {"boxes": jnp.where(there[..., None], batch["boxes"], 33.0)}
    plain = step(batch, 2)
    chex.assert_trees_all_equal(plain, step(elsewhere, 2))
    ignored = batch | {"box_ignored": there}
    other = ignored | {"box_labels": jnp.where(there, 9 - batch["box_labels"], -1)}
    _, terms, *_ = step(ignored, 2)
    assert terms["proposal_boxes"] == 0 and terms["roi_boxes"] == 0 < plain[1]["roi_boxes"]
    chex.assert_trees_all_equal(terms, step(other, 2)[1])


def test_images_without_objects_teach_that_all_is_background(trained):
    _, _, step = trained
    batch = scenes()
    empty = batch | {"box_labels": jnp.full_like(batch["box_labels"], -1)}
    total, terms, _, gradient = step(empty, 3)
    assert jnp.isfinite(total) and terms["proposal_objectness"] > 0 and terms["roi_classes"] > 0
    assert terms["proposal_boxes"] == 0 and terms["roi_boxes"] == 0
    chex.assert_tree_all_finite(gradient)
    bias = gradient["classify"]["bias"]
    assert bias[0] < 0 and (bias[1:] > 0).all()


def test_the_same_key_gives_the_same_loss_to_the_bit(trained):
    _, _, step = trained
    first, again, other = (step(scenes(), key) for key in (4, 4, 5))
    chex.assert_trees_all_equal(first, again)
    assert first[0] != other[0]


def test_samples_and_the_objects_among_them_are_as_many_as_the_fields_say():
    """Where all places get the same scores, the losses tell how many were objects."""
    model, batch = PYRAMID.clone(region_samples=4), scenes()
    variables = random_variables(model, batch["image"])
    params, weight = variables["params"], 1.7
    classify, objectness = params["classify"], params["region_proposals"]["objectness"]
    for layer in (classify, objectness):
        layer["kernel"] = jnp.zeros_like(layer["kernel"])
    classify["bias"] = jnp.zeros(11).at[1:].set(weight)
    objectness["bias"] = jnp.full(3, weight)
    stats = {"batch_stats": variables["batch_stats"]}
    _, terms, _ = jax.jit(model.loss)(params, batch, jax.random.key(0), stats)
    # A quarter of four regions; there are at least two objects to take it from.
    expected = np.log(1 + 10 * np.exp(weight)) - weight / 4
    np.testing.assert_allclose(terms["roi_classes"], expected, rtol=1e-5)

    places = [
        two_stage.anchors((-(-48 // s), 64 // s), s, sizes, PYRAMID.anchor_ratios)
        for s, sizes in zip((4, 8, 16, 32), PYRAMID.anchor_sizes, strict=True)
    ]
    there = np.asarray(batch["box_labels"] >= 0)
    matches = [
        two_stage.match(np.concatenate(places), *each, np.zeros(3), 0.7, 0.3, True)
        for each in zip(np.asarray(batch["boxes"]), there, strict=True)
    ]
    found = [min((each >= 0).sum(), 16) for each in matches]
    expected = np.log(1 + np.exp(weight)) - weight * sum(found) / 64
    np.testing.assert_allclose(terms["proposal_objectness"], expected, rtol=1e-5)


class Mean(nn.Module):
    """A head that says what it sees."""

    @nn.compact
    def __call__(self, x, *, train):
        return x.mean(axis=(1, 2))


def test_regions_are_read_from_the_map_of_their_size():
    """Maps hold their number; with 56 pixels for stride 16, 14 to 28 pixels are for P2."""
    model = PYRAMID.clone(head=Mean())
    images = jnp.zeros((1, *CANVAS, 1))
    variables = random_variables(model, images)
    classify = variables["params"]["classify"]
    classify["kernel"] = jnp.full_like(classify["kernel"], 1 / 12)
    classify["bias"] = jnp.zeros_like(classify["bias"])
    maps = {f"P{i}": jnp.full((1, -(-48 // 2**i), 64 // 2**i, 12), float(i)) for i in (2, 3, 4, 5)}
    sides = jnp.array([15.0, 27, 29, 47])
    boxes = jnp.stack([0 * sides, 0 * sides, sides, sides], axis=-1)
    boxes = jnp.concatenate([boxes, jnp.array([[0.0, 0, 64, 48], [1, 1, 57, 57]])])[None]
    scores = jax.jit(
        lambda maps: model.apply(variables, maps, boxes, train=False, method="score_regions")
    )(maps)
    np.testing.assert_allclose(scores.logits[0, :, 3], [2, 2, 3, 3, 3, 4], rtol=1e-5)


class Four(nn.Module):
    """A head whose vectors are images of one pixel, as the oracle compares images."""

    head: nn.Module

    def __call__(self, x, *, train):
        return self.head(x, train=train)[:, None, None]


def test_stage_head_is_residual_blocks_and_their_mean():
    x = np.random.default_rng(0).normal(size=(5, 7, 6, 3)).astype(np.float32)
    model = Four(StageHead(8, 2, 2, norm="batch"))
    variables = random_variables(model, jnp.asarray(x), train=False)

    def forward(params, stats, x):
        params, stats = params["head"], stats["head"]
        for block, stride in (("block_0", 2), ("block_1", 1)):
            own, old = params[block], stats[block]

            def unit(name, x, own=own, old=old, **options):
                return torch_layers.conv_norm(own[name], old[name], x, False, **options)

            plain = {"activation": lambda y: y}
            y = unit("conv_2", unit("conv_1", x), stride=stride)
            y = unit("conv_3", y, **plain)
            x = unit("shortcut", x, stride=stride, **plain) if stride == 2 else x
            x = torch.relu(x + y)
        return x.mean((2, 3), keepdim=True)

    torch_layers.check(model, variables, forward, x, train=False)


def test_detections_are_cut_to_the_image_and_padding_is_empty():
    _, detect = compiled("pyramid")
    variables = random_variables(PYRAMID, scenes()["image"])
    for seed in range(2):
        found = detect(variables, scenes(seed)["image"], jnp.array([CANVAS, (31, 40)]))
        assert found.boxes.shape == (2, 7, 4)
        assert found.valid.any() and (found.classes[found.valid] >= 0).all()
        np.testing.assert_array_equal(found.classes == -1, ~found.valid)
        limits = np.array([[64, 48], [40, 31]])[:, None, None]
        assert (found.boxes >= 0).all()
        assert (found.boxes.reshape(2, 7, 2, 2) <= limits).all()
        assert (np.diff(found.scores, axis=1) <= 0).all()


def test_learns_to_find_the_objects_of_two_scenes():
    step, detect = compiled("pyramid")
    batch, optimizer = scenes(), optax.adam(5e-3)
    variables = jax.jit(PYRAMID.init)(jax.random.key(0), batch["image"])
    state = optimizer.init(variables["params"])

    @jax.jit
    def update(variables, stats, gradient, state):
        updates, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], updates), **stats}, state

    totals = []
    for key in jax.random.split(jax.random.key(0), 150):
        total, _, stats, gradient = step(variables, batch, key)
        variables, state = update(variables, stats, gradient, state)
        totals.append(float(total))
    assert np.mean(totals[-10:]) < np.mean(totals[:3]) / 4
    found = detect(variables, batch["image"], batch["image_size"])
    for b, box in np.argwhere(batch["box_labels"] >= 0):
        overlaps = [two_stage.iou(each, batch["boxes"][b, box]) for each in found.boxes[b]]
        right = (found.classes[b] == batch["box_labels"][b, box]) & (found.scores[b] > 0.3)
        assert (right & (np.array(overlaps) > 0.5)).any(), found


# Parameters of torchvision's ResNet-50 without its classifier, and of its norms.
RESNET50, NORMS = 25_557_032 - 2_049_000, 53_120
PUBLISHED = {
    # torchvision's own count, which leaves frozen norms out.
    "fpn": (41_755_286 + NORMS, 1000, 91),
    "c4": (RESNET50 + 9 * 1024 * 512 + 512 + 513 * 15 * 5 + 2049 * 81 * 5, 300, 81),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, proposals, logits = PUBLISHED[name]
    model = getattr(faster_rcnn, f"faster_rcnn_resnet50_{name}")()
    images = jax.ShapeDtypeStruct((2, 832, 768, 3), jnp.float32)
    key = jax.random.key(0)
    (_, scores), variables = jax.eval_shape(model.init_with_output, key, images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert scores.deltas.shape == (2, proposals, logits, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"region_maps": ("P2", "P9")}, r"region_maps \['P9'\] are none of the backbone's \{'P2'"),
        ({"proposal_maps": ("C2",)}, r"proposal_maps \['C2'\] are none of"),
        ({"pooling": "mean"}, "pooling='mean' is neither 'align' nor 'max'"),
        ({"pooling": "max"}, r"pooling='max' takes one map, not region_maps=\('P2', 'P3', 'P4'\)"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"FasterRCNN: {message}"):
        PYRAMID.clone(**fields).init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
