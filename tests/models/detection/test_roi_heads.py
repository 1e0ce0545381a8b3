"""What RoIs learn and say, against loops over single boxes and against torch's losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models.detection import two_stage as oracle
from torch.nn import functional

from jaxmodels.models.detection.region_proposals import Proposals
from jaxmodels.models.detection.roi_heads import (
    ROI_WEIGHTS,
    RoITargets,
    roi_detections,
    roi_losses,
    roi_targets,
    sample_targets,
)

SIZE = np.array([37.0, 53.0])
CLASSES = 5


def scene():
    """Three images: the first has all kinds of objects, the second a crowd, the last nothing."""
    rng = np.random.default_rng(0)
    boxes = np.stack([oracle.boxes_in(rng, 7, SIZE, 9) for _ in range(3)])
    labels = rng.integers(0, CLASSES, (3, 7))
    there = np.array([[1, 1, 1, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0], [0] * 7], bool)
    ignored = np.array([[0] * 7, [1, 0, 1, 0, 0, 0, 0], [0] * 7], bool)
    labels[0, 1] = labels[1, 3] = -2
    boxes[1, 0] = (0, 0, 30, 37)
    around = boxes[:, rng.integers(0, 7, 23)] + rng.normal(size=(3, 23, 4)) * 2
    rois = np.concatenate([around, [oracle.boxes_in(rng, 8, SIZE) for _ in range(3)]], axis=1)
    rois[..., 2:] = np.maximum(rois[..., 2:], rois[..., :2] + 1)
    valid = rng.uniform(size=(3, 31)) < 0.8
    rois, boxes = (x.astype(np.float32) for x in (rois, boxes))
    return Proposals(rois, np.zeros_like(valid, np.float32), valid), boxes, labels, there, ignored


def expected_targets(proposals, boxes, labels, there, ignored, threshold=0.5):
    """Of one image, RoI by RoI."""
    rois = np.concatenate([proposals.boxes, boxes])
    candidates = np.concatenate([proposals.valid, there])
    matches = oracle.match(rois, boxes, there, ignored, threshold, threshold, False)
    wanted, deltas = np.full(len(rois), -1), np.zeros((len(rois), 4))
    for i, match in enumerate(matches):
        if match >= 0:
            deltas[i] = oracle.encode(boxes[match], rois[i], ROI_WEIGHTS)
        if candidates[i] and match >= -1:
            wanted[i] = max(labels[match] + 1, -1) if match >= 0 else 0
    return rois, wanted, deltas


def test_targets_are_those_of_the_definition():
    proposals, *truth = scene()
    found = jax.jit(roi_targets)(proposals, *truth)
    kinds = set()
    for b in range(3):
        one = Proposals(*(field[b] for field in proposals))
        rois, labels, deltas = expected_targets(one, *(each[b] for each in truth))
        np.testing.assert_array_equal(found.rois[b], rois)
        np.testing.assert_array_equal(found.labels[b], labels)
        np.testing.assert_allclose(found.deltas[b], deltas, rtol=1e-4, atol=1e-4)
        kinds |= {*labels}
    assert {-1, 0} < kinds and len(kinds) > 4


def test_samples_are_those_that_count_and_few_of_them_objects():
    labels = np.array([[-1, 0, 3, 0, 1, -1, 2, 4, 0, 0], [2, 0, 0, -1, -1, -1, -1, -1, -1, -1]])
    places = np.arange(20.0, dtype=np.float32).reshape(2, 10)
    targets = RoITargets(*(jnp.asarray(x) for x in (
        np.repeat(places[..., None], 4, -1), labels, np.repeat(-places[..., None], 4, -1)
    )))  # fmt: skip
    sample = jax.jit(sample_targets, static_argnums=(2, 3))
    seen = set()
    for seed in range(9):
        found = sample(jax.random.key(seed), targets, 5, 0.4)
        assert found.labels.shape == (2, 5)
        for b, (objects, background) in enumerate(((2, 3), (1, 2))):
            got = np.asarray(found.labels[b])
            assert ((got > 0).sum(), (got == 0).sum()) == (objects, background)
            chosen = np.asarray(found.rois[b, :, 0])[got >= 0]
            assert len({*chosen}) == objects + background
            np.testing.assert_array_equal(labels.ravel()[chosen.astype(int)], got[got >= 0])
            np.testing.assert_array_equal(found.deltas[b], -found.rois[b])
            seen |= {*chosen}
    assert seen == {*places[labels >= 0]}


def draw_head(sets, seed=1):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 11, CLASSES + 1)).astype(np.float32)
    deltas = rng.normal(size=(2, 11, sets, 4)).astype(np.float32)
    labels = rng.integers(-1, CLASSES + 1, (2, 11))
    targets = rng.normal(size=(2, 11, 4)).astype(np.float32)
    targets = RoITargets(np.zeros((2, 11, 4), np.float32), labels, targets)
    return jax.tree.map(jnp.asarray, (logits, deltas, targets))


@pytest.mark.parametrize(("sets", "hardest"), [(1, 3), (CLASSES + 1, None), (CLASSES + 1, 100)])
def test_losses_and_gradients_are_torchs_on_the_hardest(sets, hardest):
    logits, deltas, targets = draw_head(sets)
    theirs = [torch.tensor(np.asarray(x), requires_grad=True) for x in (logits, deltas)]
    terms = {"roi_classes": 0, "roi_boxes": 0}
    count = 0
    for b in range(2):
        losses = []
        for r, label in enumerate(np.asarray(targets.labels[b])):
            if label < 0:
                continue
            classes = functional.cross_entropy(theirs[0][b, r], torch.tensor(int(label)))
            predicted = theirs[1][b, r, label if sets > 1 else 0]
            boxes = functional.smooth_l1_loss(
                predicted,
                torch.tensor(np.asarray(targets.deltas[b, r])),
                beta=1 / 9,
                reduction="sum",
            )
            losses.append((classes, boxes * float(label > 0)))
        losses.sort(key=lambda pair: -sum(pair).item())
        for classes, boxes in losses[:hardest]:
            terms["roi_classes"] += classes
            terms["roi_boxes"] += boxes
            count += 1
    terms = {name: term / count for name, term in terms.items()}
    sum(terms.values()).backward()

    def loss(logits, deltas):
        found = roi_losses(logits, deltas, targets, num_hardest=hardest)
        return sum(found.values()), found

    gradients, found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(logits, deltas)
    assert found.keys() == terms.keys()
    for name in terms:
        np.testing.assert_allclose(found[name], terms[name].detach(), rtol=1e-5)
    for ours, reference in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(ours, reference.grad, rtol=1e-4, atol=1e-7)


def test_images_without_rois_cost_nothing():
    logits, deltas, targets = draw_head(1)
    nothing = targets._replace(labels=jnp.full_like(targets.labels, -1))

    @jax.jit
    @jax.value_and_grad
    def loss(logits):
        return sum(roi_losses(logits, deltas, nothing, num_hardest=4).values())

    total, gradient = loss(logits)
    assert float(total) == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("sets", [1, CLASSES + 1])
def test_detections_are_those_of_the_definition(sets):
    rng = np.random.default_rng(3)
    rois = np.stack([oracle.boxes_in(rng, 19, SIZE, 5) for _ in range(2)])
    rois[1, 4, 2] = rois[1, 4, 0]
    valid = np.array([[True] * 19, [True] * 11 + [False] * 8])
    logits = rng.normal(size=(2, 19, CLASSES + 1)).astype(np.float32) * 2
    deltas = rng.normal(size=(2, 19, sets, 4)).astype(np.float32)
    sizes = np.array([SIZE, (29, 41)], np.float32)
    limits = {"score_threshold": 0.1, "iou_threshold": 0.4, "max_detections": 13}
    found = jax.jit(lambda *x: roi_detections(*x, **limits))(
        Proposals(rois, np.zeros((2, 19), np.float32), valid), logits, deltas, sizes
    )
    for b in range(2):
        own = valid[b]
        probabilities = np.exp(logits[b, own].astype(np.float64))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        each = np.broadcast_to(deltas[b, own], (own.sum(), CLASSES + 1, 4))
        boxes, scores, classes = oracle.detect(
            probabilities, each, rois[b, own], sizes[b], *limits.values()
        )
        count = len(boxes)
        np.testing.assert_array_equal(found.valid[b], np.arange(13) < count)
        np.testing.assert_array_equal(found.classes[b, :count], classes)
        np.testing.assert_allclose(found.scores[b, :count], scores, rtol=1e-5)
        np.testing.assert_allclose(found.boxes[b, :count], boxes, rtol=1e-4, atol=1e-3)


def test_numbers_of_deltas_that_fit_nothing_are_named():
    logits, deltas, targets = draw_head(3)
    message = r"deltas \(2, 11, 3, 4\) .* must have D = 1, .*, or D = 6"
    with pytest.raises(ValueError, match=f"roi_losses: {message}"):
        roi_losses(logits, deltas, targets)
    proposals = Proposals(targets.rois, targets.rois[..., 0], targets.labels > 0)
    limits = {"score_threshold": 0.1, "iou_threshold": 0.4, "max_detections": 13}
    with pytest.raises(ValueError, match=f"roi_boxes: {message}"):
        roi_detections(proposals, logits, deltas, jnp.ones((2, 2)), **limits)
