"""R-FCN: votes against loops over bins, the whole loss against torch on the hardest RoIs."""

import math

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
from jaxmodels.models.detection.r_fcn import RFCN, PositionSensitiveVote
from jaxmodels.models.detection.roi_heads import ROI_WEIGHTS
from jaxmodels.models.vision.residual_variants import DeformableResNet
from jaxmodels.models.vision.resnet import ResNet

STRIDE, GRID = 4, 3
BACKBONE = {
    "depths": (1, 1, 1, 1),
    "widths": (4, 5, 6, 7),
    "bottleneck": False,
    "stem_width": 4,
    "in_channels": 1,
    "num_classes": 0,
    "output_stride": 16,
}
MODEL = RFCN(
    ResNet(**BACKBONE),
    num_classes=3,
    anchor_sizes=(9.0, 17.0),
    proposal_width=5,
    candidates=(30, 23),
    proposals=(17, 13),
    proposal_samples=200,
    width=11,
    grid=GRID,
    num_hardest=6,
    score_threshold=0.1,
    iou_threshold=0.9,
    max_detections=40,
)
DEFORMABLE = MODEL.clone(backbone=DeformableResNet(**BACKBONE), pooling="deformable")


def rounded(value):
    """Halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def pooled(maps, roi, features, stride=STRIDE):
    """(GRID, GRID, features): each bin's mean of its own channels of one image."""
    out = np.zeros((GRID, GRID, features))
    left, top, right, bottom = (rounded(side / stride) for side in roi)
    height, width = max(bottom - top, 1), max(right - left, 1)
    for p in range(GRID):
        for q in range(GRID):
            rows = range(
                top + math.floor(p * height / GRID), top + math.ceil((p + 1) * height / GRID)
            )
            columns = range(
                left + math.floor(q * width / GRID), left + math.ceil((q + 1) * width / GRID)
            )
            inside = [
                maps[y, x, (p * GRID + q) * features : (p * GRID + q + 1) * features]
                for y in rows
                for x in columns
                if 0 <= y < maps.shape[0] and 0 <= x < maps.shape[1]
            ]
            out[p, q] = np.mean(inside, axis=0) if inside else 0
    return out


def bilinear(channels, y, x):
    """Of a (Y, X, C) map, which goes on for a pixel and is zero further out."""
    rows, columns = channels.shape[:2]
    if y < -1 or y > rows or x < -1 or x > columns:
        return np.zeros(channels.shape[2])
    y, x = np.clip(y, 0, rows - 1), np.clip(x, 0, columns - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
    dy, dx = y - y0, x - x0
    upper = (1 - dx) * channels[y0, x0] + dx * channels[y0, x1]
    return (1 - dy) * upper + dy * ((1 - dx) * channels[y1, x0] + dx * channels[y1, x1])


def pooled_where_sent(maps, roi, offsets, features):
    """The same with every bin moved by a tenth of the RoI times its offsets."""
    out = np.zeros((GRID, GRID, features))
    left, top, right, bottom = (side / STRIDE - 0.5 for side in roi)
    height, width = bottom - top, right - left
    for p in range(GRID):
        for q in range(GRID):
            own = maps[..., (p * GRID + q) * features : (p * GRID + q + 1) * features]
            dy, dx = 0.1 * height * offsets[p, q, 0], 0.1 * width * offsets[p, q, 1]
            for i in (0.25, 0.75):
                for j in (0.25, 0.75):
                    y = top + (p + i) * height / GRID + dy
                    x = left + (q + j) * width / GRID + dx
                    out[p, q] += bilinear(own, y, x) / 4
    return out


@pytest.mark.parametrize("pooling", ["mean", "align", "deformable"])
def test_votes_are_means_of_each_bins_own_maps(pooling):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 11, 13, 5))
    rois = np.stack([oracle.boxes_in(rng, 7, np.array([44.0, 52.0])) for _ in range(2)])
    model = PositionSensitiveVote(2, GRID, STRIDE, pooling)
    arrays = jnp.asarray(x, jnp.float32), jnp.asarray(rois)
    variables = torch_layers.random_variables(model, *arrays)
    found = jax.jit(model.apply)(variables, *arrays)
    layers = {
        name: x @ np.asarray(each["kernel"], np.float64)[0, 0] + np.asarray(each["bias"])
        for name, each in variables["params"].items()
    }
    for b in range(2):
        for n in range(7):
            if pooling == "mean":
                bins = pooled(layers["maps"][b], rois[b, n], 2)
            else:
                offsets = np.zeros((GRID, GRID, 2))
                if pooling == "deformable":
                    offsets = pooled(layers["moves"][b], rois[b, n], 2)
                bins = pooled_where_sent(layers["maps"][b], rois[b, n], offsets, 2)
            expected = bins.reshape(-1, 2).mean(axis=0)
            np.testing.assert_allclose(found[b, n], expected, rtol=1e-4, atol=1e-5)


def scores_in_training(model, boxes, images, sizes):
    """What is said of all proposals and of the true boxes."""
    maps = model.backbone.features(images, train=True)
    _, proposals = model.propose(maps, sizes, train=True)
    rois = jnp.concatenate([proposals.boxes, boxes], axis=1)
    return proposals, rois, model.score_regions(maps, rois)


def expected_losses(batch, proposals, rois, said):
    """Those of the six RoIs of each image whose loss is largest."""
    chosen = []
    for b in range(3):
        boxes, labels = batch["boxes"][b], batch["box_labels"][b]
        ignored = batch["box_ignored"][b]
        there = (labels >= 0) & ~ignored
        matches = oracle.match(rois[b], boxes, there, ignored, 0.5, 0.5, False)
        losses = []
        for n in np.flatnonzero(np.concatenate([proposals.valid[b], there])):
            if matches[n] < -1:
                continue
            label = int(labels[matches[n]]) + 1 if matches[n] >= 0 else 0
            logits = torch.tensor(said[0][b, n])[None]
            classes, distance = functional.cross_entropy(logits, torch.tensor([label])).item(), 0.0
            if label:
                target = oracle.encode(boxes[matches[n]], rois[b, n], ROI_WEIGHTS)
                error = torch.tensor(said[1][b, n, 0]), torch.tensor(target).float()
                distance = functional.smooth_l1_loss(*error, beta=1 / 9, reduction="sum").item()
            losses.append((classes, distance))
        assert len(losses) > 6
        chosen += sorted(losses, key=sum)[-6:]
    return {
        "roi_classes": sum(c for c, _ in chosen) / 18,
        "roi_boxes": sum(d for _, d in chosen) / 18,
    }


def test_losses_are_those_of_the_hardest_proposals_and_true_boxes():
    batch = learning.batch_of()
    variables = torch_layers.random_variables(MODEL, jnp.asarray(batch["image"]))

    @jax.jit
    def run(variables, batch):
        options = {"mutable": ["batch_stats"], "method": scores_in_training}
        sizes = batch["image_size"].astype(jnp.float32)
        said, _ = MODEL.apply(variables, batch["boxes"], batch["image"], sizes, **options)
        state = {"batch_stats": variables["batch_stats"]}
        return said, MODEL.loss(variables["params"], batch, jax.random.key(0), state)[1]

    said, terms = jax.tree.map(np.asarray, run(variables, batch))
    for name, expected in expected_losses(batch, *said).items():
        np.testing.assert_allclose(terms[name], expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("model", [MODEL, DEFORMABLE], ids=["plain", "deformable"])
def test_learning_and_detecting(model):
    batch = learning.batch_of()
    variables = learning.check_learning(model, batch)
    learning.check_detecting(model, variables, batch)


def test_detections_are_what_the_maps_say_of_the_proposals():
    images = learning.batch_of()["image"]
    variables = torch_layers.random_variables(MODEL, jnp.asarray(images))

    @jax.jit
    def run(variables, images):
        said, seen = MODEL.apply(
            variables, images, capture_intermediates=lambda _, name: name == "features"
        )
        last = seen["intermediates"]["backbone"]["features"][0]["C5"]
        return MODEL.detect(variables, images), *said, last

    found, proposals, logits, deltas, last = jax.tree.map(np.asarray, run(variables, images))
    assert proposals.boxes.shape == (3, 13, 4)

    def dense(x, layer):
        return x @ np.asarray(layer["kernel"], np.float64)[0, 0] + np.asarray(layer["bias"])

    params = variables["params"]
    reduced = np.maximum(dense(last, params["reduce"]), 0)
    for name, said, features in (("classes", logits, 4), ("boxes", deltas[:, :, 0], 4)):
        maps = dense(reduced, params[name]["maps"])
        for b, n in ((0, 0), (1, 3), (2, 5)):
            bins = pooled(maps[b], proposals.boxes[b, n], features, stride=16)
            np.testing.assert_allclose(said[b, n], bins.mean(axis=(0, 1)), rtol=1e-4, atol=1e-5)
    for b in range(3):
        own = proposals.valid[b]
        probabilities = np.exp(logits[b, own].astype(np.float64))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        moves = np.tile(deltas[b, own], (1, 4, 1))
        boxes, scores, classes = oracle.detect(
            probabilities, moves, proposals.boxes[b, own], images.shape[1:3], 0.1, 0.9, 40
        )
        count = len(boxes)
        assert found.valid[b].sum() == count > 2
        np.testing.assert_array_equal(found.classes[b, :count], classes)
        np.testing.assert_allclose(found.scores[b, :count], scores, rtol=1e-4)
        np.testing.assert_allclose(found.boxes[b, :count], boxes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("field", ["proposal_map", "region_map"])
def test_maps_that_are_not_there_are_named(field):
    message = rf"RFCN: {field}='P9' is none of the backbone's \{{'C2': 4, .*'C5': 16\}}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            MODEL.clone(**{field: "P9"}).init, jax.random.key(0), jnp.zeros((1, 40, 56, 1))
        )


def test_unknown_poolings_are_refused():
    with pytest.raises(ValueError, match=r"RFCN: pooling='max' is none of \['mean'"):
        jax.eval_shape(
            MODEL.clone(pooling="max").init, jax.random.key(0), jnp.zeros((1, 40, 56, 1))
        )


@pytest.mark.parametrize("name", ["r_fcn_resnet101", "r_fcn_resnet101_deformable"])
def test_published_sizes(name):
    model = jaxmodels.create_model(name)
    images = jax.ShapeDtypeStruct((1, 97, 113, 3), jnp.float32)
    (proposals, logits, deltas), variables = jax.eval_shape(
        model.init_with_output, jax.random.key(0), images
    )
    count = proposals.boxes.shape[1]
    assert logits.shape == (1, count, 81) and deltas.shape == (1, count, 1, 4)
    params = variables["params"]
    assert params["reduce"]["kernel"].shape == (1, 1, 2048, 1024)
    assert params["classes"]["maps"]["kernel"].shape == (1, 1, 1024, 49 * 81)
    assert params["boxes"]["maps"]["kernel"].shape == (1, 1, 1024, 49 * 4)
    assert ("moves" in params["boxes"]) == ("deformable" in name)
    assert ("offsets" in params["backbone"]["stages_3_2"]["conv_2"]["conv"]) == (
        "deformable" in name
    )
