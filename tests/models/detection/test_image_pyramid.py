"""Several scales against one after the other: torch's resizing, and suppression by the book."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models.detection import two_stage as oracle
from torch.nn import functional

from jaxmodels import training
from jaxmodels.models.detection.detector import Detector, objects
from jaxmodels.models.detection.image_pyramid import (
    detect_multi_scale,
    merge_detections,
    multi_scale_loss,
    resize_batch,
)
from jaxmodels.ops.detections import Detections

SCALES = (1.0, 0.5, 1.6)


class Quarters(Detector):
    """Calls each quarter of an image an object whose score is its brightness."""

    @nn.compact
    def __call__(self, images, *, train=False):
        weight = self.param("weight", nn.initializers.ones, ())
        rows, columns = (side // 2 for side in images.shape[1:3])
        halves = (images[:, :rows], images[:, rows:])
        quarters = [
            part for half in halves for part in (half[:, :, :columns], half[:, :, columns:])
        ]
        return weight * jnp.stack([part.mean(axis=(1, 2, 3)) for part in quarters], axis=1)

    def losses(self, batch):
        there, _ = objects(batch)
        areas = jnp.prod(batch["boxes"][..., 2:] - batch["boxes"][..., :2], axis=-1)
        sizes = batch["image_size"].astype(jnp.float32).sum()
        found = (self(batch["image"], train=True) ** 2).sum() * 100
        return {"sum": found + (areas * there).sum() + sizes}

    def detections(self, images, image_sizes):
        scores = nn.sigmoid(4 * self(images))
        half = image_sizes[:, None, ::-1] / 2
        corners = jnp.array([[0, 0], [1, 0], [0, 1], [1, 1]], jnp.float32)[None]
        low = corners * half * 0.8 + 1  # a pixel of any scale
        boxes = jnp.concatenate([low, low + half], axis=-1)
        classes = jnp.tile(jnp.array([[0, 1, 0, 0]]), (len(images), 1))
        there = scores > 0.3
        return Detections(boxes, scores, classes, there)


def draw_images():
    images = np.random.default_rng(0).normal(size=(3, 14, 22, 2)).astype(np.float32)
    return images, np.array([[14, 22], [11, 17], [7, 22]])


def resized(images, scale):
    """By torch, and the factors of x, y, x, y."""
    size = tuple(round(side * scale) for side in images.shape[1:3])
    x = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
    x = functional.interpolate(x, size, mode="bilinear", antialias=True)
    y_factor, x_factor = (new / old for new, old in zip(size, images.shape[1:3], strict=True))
    return x.permute(0, 2, 3, 1).numpy(), np.array([x_factor, y_factor] * 2)


def by_the_book(boxes, scores, method, threshold, sigma):
    """Indices and scores after suppression within one class (Bodla et al. 2017, figure 2)."""
    left, found = list(range(len(boxes))), []
    scores = np.array(scores, np.float64)
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        found.append((best, scores[best]))
        for i in list(left):
            overlap = oracle.iou(boxes[best], boxes[i])
            if method == "hard" and overlap > threshold:
                left.remove(i)
            elif method == "linear" and overlap > threshold:
                scores[i] *= 1 - overlap
            elif method == "gaussian":
                scores[i] *= np.exp(-(overlap**2) / sigma)
    return found


def merged(boxes, scores, classes, valid, method, threshold, sigma, count):
    """Of one image: (score, class, box), best first, of scores above 0.05."""
    found = []
    for c in {*classes[valid]}:
        own = np.flatnonzero(valid & (classes == c))
        kept = by_the_book(boxes[own], scores[own], method, threshold, sigma)
        found += [(score, c, boxes[own[i]]) for i, score in kept if score > 0.05]
    return sorted(found, key=lambda each: -each[0])[:count]


def check(found, b, expected):
    count = len(expected)
    np.testing.assert_array_equal(found.valid[b], np.arange(found.valid.shape[1]) < count)
    for i, (score, c, box) in enumerate(expected):
        assert found.classes[b, i] == c
        np.testing.assert_allclose(found.scores[b, i], score, rtol=1e-4)
        np.testing.assert_allclose(found.boxes[b, i], box, rtol=1e-4, atol=1e-4)
    assert not np.asarray(found.boxes[b, count:]).any()
    assert not np.asarray(found.scores[b, count:]).any()
    assert (np.asarray(found.classes[b, count:]) == -1).all()


def test_detection_at_all_scales_is_detection_at_each():
    images, sizes = draw_images()
    model, variables = Quarters(), {"params": {"weight": jnp.array(1.7)}}
    options = {"method": "linear", "iou_threshold": 0.3, "max_detections": 9}
    options["score_threshold"] = 0.05
    detect = jax.jit(lambda x, s: detect_multi_scale(model, variables, x, SCALES, s, **options))
    found = detect(images, sizes)
    assert found.boxes.shape == (3, 9, 4)
    parts = []
    for scale in SCALES:
        x, factors = resized(images, scale)
        each = jax.jit(lambda x, s: model.detect(variables, x, s))(x, sizes * factors[1::-1])
        parts.append(each._replace(boxes=np.asarray(each.boxes) / factors))
    joined = [np.concatenate(each, axis=1) for each in zip(*parts, strict=True)]
    for b in range(3):
        expected = merged(*(each[b] for each in joined), "linear", 0.3, None, 9)
        check(found, b, expected)
    # Without sizes nothing was padded.
    whole = jax.jit(lambda x: detect_multi_scale(model, variables, x, SCALES, **options))(images)
    np.testing.assert_allclose(whole.boxes[0], found.boxes[0], rtol=1e-5)
    assert whole.boxes[1].max() > found.boxes[1].max() + 3


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hard", {"iou_threshold": 0.2}),
        ("linear", {"iou_threshold": 0.2}),
        ("gaussian", {"sigma": 0.4}),
    ],
)
def test_merging_is_suppression_within_each_class(method, options):
    rng = np.random.default_rng(1)
    boxes = np.stack([oracle.boxes_in(rng, 23, np.array([31.0, 41.0]), 7) for _ in range(2)])
    scores = rng.uniform(0.1, 1, (2, 23)).astype(np.float32)
    classes = rng.integers(0, 3, (2, 23))
    valid = rng.uniform(size=(2, 23)) < 0.8
    valid[1, 3:] = False
    found = jax.jit(
        lambda *each: merge_detections(
            Detections(*each), method=method, **options, score_threshold=0.05, max_detections=17
        )
    )(boxes, scores, classes, valid)
    for b in range(2):
        fields = (each[b] for each in (boxes, scores, classes, valid))
        check(found, b, merged(*fields, method, 0.2, 0.4, 17))


def batch_of():
    images, sizes = draw_images()
    rng = np.random.default_rng(2)
    boxes = np.stack([oracle.boxes_in(rng, 4, np.array([14.0, 22.0])) for _ in range(3)])
    labels = np.array([[1, 0, -1, 2], [0, -1, -1, -1], [-1] * 4])
    return {"image": images, "boxes": boxes, "box_labels": labels, "image_size": sizes}


def test_resized_batches_are_torchs():
    batch = batch_of()
    arrays = jax.tree.map(jnp.asarray, batch)
    found = resize_batch({**arrays, "other": arrays["boxes"]}, 0.7)
    images, factors = resized(batch["image"], 0.7)
    np.testing.assert_allclose(found["image"], images, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["boxes"], batch["boxes"] * factors, rtol=1e-6)
    np.testing.assert_allclose(found["image_size"], batch["image_size"] * factors[1::-1], rtol=1e-6)
    assert found["box_labels"] is arrays["box_labels"] and found["other"] is arrays["boxes"]
    del arrays["image_size"]
    assert "image_size" not in resize_batch(arrays, 0.7)


def test_the_key_draws_one_of_the_scales_in_one_program():
    batch, model = batch_of(), Quarters()
    there = batch["box_labels"] >= 0
    arrays = jax.tree.map(jnp.asarray, batch)
    expected = []
    for scale in SCALES:
        images, factors = resized(batch["image"], scale)
        boxes = (batch["boxes"] * factors)[there]
        rows, columns = (side // 2 for side in images.shape[1:3])
        quarters = [images[:, y, x].mean(axis=(1, 2, 3))
                    for y in (slice(rows), slice(rows, None))
                    for x in (slice(columns), slice(columns, None))]  # fmt: skip
        brightness = 100 * sum((each**2).sum() for each in quarters)
        rest = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).sum()
        rest += (batch["image_size"] * factors[1::-1]).sum()
        expected.append((1.3**2 * brightness + rest, 2 * 1.3 * brightness))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(weight, key):
        def one(weight):
            params = {"weight": weight}
            return multi_scale_loss(model, params, arrays, key, {}, scales=SCALES)[0]

        return jax.value_and_grad(one)(weight)

    drawn = []
    for seed in range(30):
        found = [float(x) for x in loss(jnp.array(1.3), jax.random.key(seed))]
        drawn.append(int(np.argmin([abs(found[0] - value) for value, _ in expected])))
        np.testing.assert_allclose(found, expected[drawn[-1]], rtol=1e-4)
    assert min(np.bincount(drawn, minlength=3)) >= 4


def test_a_training_step_takes_the_loss():
    model, batch = Quarters(), batch_of()
    optimizer = training.adamw(1e-2, steps=3)
    example = {"images": batch["image"]}
    state = training.init_state(model, optimizer, jax.random.key(0), example)
    step = training.make_step(partial(multi_scale_loss, model, scales=(1.0, 0.5)), optimizer)
    state, metrics = step(state, batch)
    assert np.isfinite(metrics["sum"]) and float(state.params["weight"]) != 1


@pytest.mark.parametrize("scales", [(), (1.0, 0.0)])
def test_scales_must_be_positive_numbers(scales):
    images = jnp.zeros((1, 4, 6, 1))
    variables = {"params": {"weight": jnp.array(1.0)}}
    message = r"scales=\(.*\) must be one positive number or more"
    with pytest.raises(ValueError, match=f"detect_multi_scale: {message}"):
        detect_multi_scale(Quarters(), variables, images, scales)
    with pytest.raises(ValueError, match=f"multi_scale_loss: {message}"):
        multi_scale_loss(Quarters(), {}, {}, jax.random.key(0), scales=scales)


def test_unknown_methods_are_named():
    nothing = Detections(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2)), *jnp.zeros((2, 1, 2), int))
    with pytest.raises(ValueError, match=r"unknown method 'soft'; pass one of \('hard', 'linear'"):
        merge_detections(nothing, method="soft")
