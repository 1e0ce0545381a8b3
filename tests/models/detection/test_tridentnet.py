"""TridentNet: its branches against torch, its scales and its joined boxes against loops."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers
from models.detection import learning
from models.detection import two_stage as oracle
from torch.nn import functional

import jaxmodels
from jaxmodels.models.detection.faster_rcnn import TwoLayerHead
from jaxmodels.models.detection.roi_heads import ROI_WEIGHTS
from jaxmodels.models.detection.tridentnet import TridentNet, TridentStage, in_range
from jaxmodels.models.vision.resnet import ResNet

RANGES = ((0.0, 14.0), (9.0, 22.0), (18.0, math.inf))
MODEL = TridentNet(
    ResNet(
        depths=(1, 1, 1), widths=(4, 6, 8), bottleneck=False, stem_width=4, in_channels=1,
        num_classes=0,
    ),
    num_classes=3,
    depth=2,
    bottleneck=False,
    ranges=RANGES,
    anchor_sizes=(9.0, 17.0),
    proposal_width=5,
    candidates=(30, 23),
    proposals=(17, 13),
    proposal_samples=200,
    region_size=3,
    head=TwoLayerHead(7),
    region_samples=44,
    norm="batch",
    score_threshold=0.2,
    max_detections=11,
)  # fmt: skip


class Branches(nn.Module):
    """A trident stage alone."""

    bottleneck: bool

    @nn.compact
    def __call__(self, x, *, train):
        return TridentStage(2, self.bottleneck, "batch", name="stage")(x, (1, 2, 3), train=train)


def trident(params, stats, x, train, dilations):
    """The same blocks on as many copies, whose 3 x 3 convolutions differ in dilation alone."""

    def wide(params, x):
        parts = zip(x.chunk(len(dilations)), dilations, strict=True)
        return torch.cat([torch_layers.conv(params, part, dilation=d) for part, d in parts])

    x = torch.cat([x] * len(dilations))
    for name in sorted(params):
        h, names = x, sorted(params[name])
        for unit in names:
            own, statistics = params[name][unit], stats[name][unit]["norm"]
            dilated = own["conv"]["kernel"].shape[0] == 3
            h = (wide if dilated else torch_layers.conv)(own["conv"], h)
            h = torch_layers.norm(own["norm"], statistics, h, train)
            h = h if unit == names[-1] else torch.relu(h)
        x = torch.relu(h + x)
    return x


@pytest.mark.parametrize(("bottleneck", "train"), [(True, True), (False, False)])
def test_branches_are_torchs_convolutions_of_shared_weights(bottleneck, train):
    x = np.random.default_rng(0).normal(size=(2, 7, 11, 8)).astype(np.float32)
    model = Branches(bottleneck)
    variables = torch_layers.random_variables(model, jnp.asarray(x), train=train)

    def forward(params, stats, x):
        return trident(params["stage"], stats["stage"], x, train, (1, 2, 3))

    torch_layers.check(model, variables, forward, x, train=train)


def test_scales_of_branches_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    boxes = np.stack([oracle.boxes_in(rng, 7, np.array([40.0, 60.0])) for _ in range(6)])
    boxes[1, 0], boxes[2, 0] = (3, 5, 3 + 7, 5 + 28), (1, 2, 1 + 27, 2 + 3)  # sides 14 and 9
    found = np.asarray(in_range(jnp.asarray(boxes), RANGES))
    for g in range(6):
        low, high = RANGES[g // 2]
        for n in range(7):
            side = math.sqrt((boxes[g, n, 2] - boxes[g, n, 0]) * (boxes[g, n, 3] - boxes[g, n, 1]))
            assert found[g, n] == (low <= side <= high)
    assert found[1, 0] and found[2, 0]
    several = jnp.asarray(boxes[:, :, None])
    np.testing.assert_array_equal(in_range(several, RANGES), found[..., None])


@pytest.fixture(scope="module")
def variables():
    return torch_layers.random_variables(MODEL, jnp.asarray(learning.batch_of()["image"]))


def test_learning():
    learning.check_learning(MODEL, learning.batch_of())


def scores_in_training(model, boxes, images, sizes):
    """What the two stages say of all anchors, of all proposals and of the true boxes."""
    x = model.branch_map(images, model.dilations, train=True)
    scored, proposals = model.propose(x, jnp.tile(sizes, (3, 1)), train=True)
    rois = jnp.concatenate([proposals.boxes, jnp.tile(boxes, (3, 1, 1))], axis=1)
    return scored, proposals, rois, model.score_regions(x, rois, train=True)


def expected_losses(batch, scored, proposals, rois, said):
    """Branch by branch: what is of another branch's scale is neither object nor background."""
    entropies, distances = ([], []), ([], [])

    def learn(stage, logits, deltas, match, places, label, weights, own):
        stage_logits = torch.tensor(logits)[None]
        if match < -1 or (match >= 0 and not own[match]):
            return
        entropies[stage].append(functional.cross_entropy(stage_logits, torch.tensor([label])))
        if match >= 0:
            target = torch.tensor(oracle.encode(boxes[match], places, weights)).float()
            error = functional.smooth_l1_loss(torch.tensor(deltas), target, beta=1 / 9)
            distances[stage].append(4 * error)

    for g in range(9):
        b, (low, high) = g % 3, RANGES[g // 3]
        boxes, labels, there = (
            batch["boxes"][b],
            batch["box_labels"][b],
            batch["box_labels"][b] >= 0,
        )
        ignored, there = there & batch["box_ignored"][b], there & ~batch["box_ignored"][b]
        own = np.array([low <= math.sqrt(oracle.area(box)) <= high for box in boxes])
        anchors = scored.anchors[0]
        matches = oracle.match(anchors, boxes, there & own, ignored | there & ~own, 0.7, 0.3, True)
        for a, match in enumerate(matches):
            # A sigmoid is a softmax beside zero.
            logits = np.array([0, scored.logits[0][g, a]], np.float32)
            label = int(match >= 0)
            learn(0, logits, scored.deltas[0][g, a], match, anchors[a], label, oracle.ONES, own)
        matches = oracle.match(rois[g], boxes, there, ignored, 0.5, 0.5, False)
        near = [low <= math.sqrt(oracle.area(roi)) <= high for roi in rois[g]]
        valid = np.concatenate([proposals.valid[g], there]) & near
        for n in np.flatnonzero(valid):
            label = int(labels[matches[n]]) + 1 if matches[n] >= 0 else 0
            learn(
                1, said[0][g, n], said[1][g, n, 0], matches[n], rois[g, n], label, ROI_WEIGHTS, own
            )
    for stage, (first, second) in enumerate(
        (("proposal_objectness", "proposal_boxes"), ("roi_classes", "roi_boxes"))
    ):
        yield first, sum(entropies[stage]) / len(entropies[stage])
        yield second, sum(distances[stage]) / len(entropies[stage])


def test_losses_are_those_of_each_branch_on_objects_of_its_scale(variables):
    batch = learning.batch_of()

    @jax.jit
    def run(variables, batch):
        options = {"mutable": ["batch_stats"], "method": scores_in_training}
        sizes = batch["image_size"].astype(jnp.float32)
        said, _ = MODEL.apply(variables, batch["boxes"], batch["image"], sizes, **options)
        state = {"batch_stats": variables["batch_stats"]}
        return said, MODEL.loss(variables["params"], batch, jax.random.key(0), state)[1]

    said, terms = jax.tree.map(np.asarray, run(variables, batch))
    expected = dict(expected_losses(batch, *said))
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        np.testing.assert_allclose(term, expected[name], rtol=1e-4, err_msg=name)


def expected_detections(model, said, sizes, ranges):
    """Of each image: what is said of the proposals of all branches, if of their scale."""
    proposals, logits, deltas = jax.tree.map(np.asarray, said)
    for b, size in enumerate(sizes):
        probabilities, kept, moves = [], [], []
        for branch, (low, high) in enumerate(ranges):
            g = branch * len(sizes) + b
            for n in np.flatnonzero(proposals.valid[g]):
                roi = proposals.boxes[g, n]
                box = oracle.clip(oracle.decode(deltas[g, n, 0], roi, ROI_WEIGHTS), size)
                if low <= math.sqrt(oracle.area(box)) <= high:
                    exponents = np.exp(logits[g, n].astype(np.float64))
                    probabilities.append(exponents / exponents.sum())
                    kept.append(roi)
                    moves.append(np.tile(deltas[g, n], (4, 1)))
        yield oracle.detect(
            np.array(probabilities), np.array(moves), kept, size,
            model.score_threshold, model.iou_threshold, model.max_detections,
        )  # fmt: skip


def check_detections(found, expected):
    for b, (boxes, scores, classes) in enumerate(expected):
        count = len(boxes)
        assert found.valid[b].sum() == count > 2
        np.testing.assert_allclose(found.scores[b, :count], scores, rtol=1e-4)
        np.testing.assert_array_equal(found.classes[b, :count], classes)
        np.testing.assert_allclose(found.boxes[b, :count], boxes, rtol=1e-3, atol=1e-3)


def test_detections_are_those_of_all_branches_of_their_scale_joined(variables):
    images = learning.batch_of()["image"]
    found, said = jax.jit(lambda v, x: (MODEL.detect(v, x), MODEL.apply(v, x)))(variables, images)
    sizes = [images.shape[1:3]] * 3
    check_detections(found, expected_detections(MODEL, said, sizes, RANGES))


def test_detecting(variables):
    learning.check_detecting(MODEL, variables, learning.batch_of())


def test_the_middle_branch_alone_detects_fast(variables):
    """Its blocks are those of dilation 2, and no box is too large or too small for it."""
    images, model = learning.batch_of()["image"], MODEL.clone(fast=True)

    @jax.jit
    def run(variables, images):
        said, seen = model.apply(
            variables,
            images,
            capture_intermediates=lambda _, name: name in ("features", "__call__"),
        )
        return model.detect(variables, images), said, seen["intermediates"]

    found, said, seen = run(variables, images)
    x = torch.tensor(np.asarray(seen["backbone"]["features"][0]["C4"])).permute(0, 3, 1, 2)
    params = torch_layers.tensors(variables["params"]["trident"])
    stats = torch_layers.tensors(variables["batch_stats"]["trident"])
    expected = trident(params, stats, x, False, (2,)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(seen["trident"]["__call__"][0], expected, rtol=1e-4, atol=1e-4)
    sizes = [images.shape[1:3]] * 3
    check_detections(found, expected_detections(model, said, sizes, [(0, math.inf)]))


def test_training_takes_all_branches_though_one_detects():
    images = learning.batch_of()["image"]
    counts = []
    for train in (True, False):
        apply = partial(MODEL.clone(fast=True).init_with_output, train=train)
        said, _ = jax.eval_shape(apply, jax.random.key(0), images)
        counts.append(said[0].boxes.shape[:2])
    assert counts == [(9, 17), (3, 13)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"level": "C7"}, r"level='C7' is none of the backbone's \{'C2': 4, .*\}"),
        ({"dilations": (1, 2)}, r"dilations=\(1, 2\) and ranges=.* must be equally many"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(ValueError, match=f"TridentNet: {message}"):
        jax.eval_shape(MODEL.clone(**fields).init, jax.random.key(0), jnp.zeros((1, 40, 56, 1)))


def test_published_sizes():
    model = jaxmodels.create_model("tridentnet_resnet101")
    images = jax.ShapeDtypeStruct((1, 97, 113, 3), jnp.float32)
    (proposals, logits, deltas), variables = jax.eval_shape(
        model.init_with_output, jax.random.key(0), images
    )
    count = proposals.boxes.shape[1]
    assert logits.shape == (3, count, 81) and deltas.shape == (3, count, 1, 4)
    params = variables["params"]
    assert len(params["trident"]) + len([k for k in params["backbone"] if "stages_2" in k]) == 23
    assert params["trident"]["block_21"]["conv_2"]["conv"]["kernel"].shape == (3, 3, 256, 256)
    assert params["head"]["block_2"]["conv_3"]["conv"]["kernel"].shape == (1, 1, 512, 2048)
