"""Detections against a selection class by class, box by box, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.test_nms import greedy

from jaxmodels.ops.select_detections import select_detections

BOXES, CLASSES = 23, 3


def by_definition(boxes, scores, score_threshold, iou_threshold, max_detections, candidates):
    """Rows of (box, score, class): every class by itself, then all by score."""
    pairs = [(n, k) for n, k in np.ndindex(scores.shape) if scores[n, k] > score_threshold]
    pairs = sorted(pairs, key=lambda pair: -scores[pair])[:candidates]
    own = boxes if boxes.ndim == 3 else np.repeat(boxes[:, None], scores.shape[1], axis=1)
    kept = []
    for k in range(scores.shape[1]):
        members = [pair for pair in pairs if pair[1] == k]
        there = greedy(
            np.reshape([own[pair] for pair in members], (-1, 4)),
            np.array([scores[pair] for pair in members]),
            iou_threshold,
        )
        kept += [pair for pair, stays in zip(members, there, strict=True) if stays]
    kept = sorted(kept, key=lambda pair: (-scores[pair], pair))[:max_detections]
    return [(own[pair].tolist(), scores[pair], pair[1]) for pair in kept]


@pytest.mark.parametrize(
    ("own_boxes", "max_detections", "candidates"),
    [(False, 7, 1000), (True, 13, 11)],
)
def test_equals_the_definition_for_each_image(own_boxes, max_detections, candidates):
    """Fewer places than are kept; and a cut before suppression, to fewer than there are places."""
    options = {"score_threshold": 0.25, "iou_threshold": 0.5, "max_detections": max_detections}

    @jax.jit
    def select(boxes, scores):
        return jax.vmap(
            lambda boxes, scores: select_detections(
                boxes, scores, max_candidates=candidates, **options
            )
        )(boxes, scores)

    for seed in range(5):
        rng = np.random.default_rng(seed)
        shape = (2, BOXES, CLASSES, 4) if own_boxes else (2, BOXES, 4)
        low = rng.integers(0, 8, size=(*shape[:-1], 2))
        high = low + rng.integers(1, 6, size=low.shape)
        boxes = np.concatenate([low, high], axis=-1).astype(np.float32)
        scores = rng.choice([0.25, 0.3, 0.5, 0.75, np.nan], size=(2, BOXES, CLASSES))
        scores[1] = np.where(rng.uniform(size=scores[1].shape) < 0.9, 0.1, scores[1])
        scores = scores.astype(np.float32)
        found = select(boxes, scores)
        for image in range(2):
            expected = by_definition(boxes[image], scores[image], *options.values(), candidates)
            count = int(found.valid[image].sum())
            assert found.valid[image].tolist() == [n < count for n in range(max_detections)]
            rows = zip(*(part[image, :count].tolist() for part in found[:3]), strict=True)
            assert [*rows] == expected
            assert not found.boxes[image, count:].any() and not found.scores[image, count:].any()
            assert (found.classes[image, count:] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": (5, 3, 4)}, r"boxes \(5, 3, 4\) do not go with scores \(5, 2\) .* \(N, K, 4\)"),
        ({"boxes": (4, 4)}, r"boxes \(4, 4\) do not go with scores \(5, 2\)"),
        ({"max_detections": 0}, "max_detections=0 must be at least 1"),
        ({"max_candidates": 0}, "max_candidates=0 must be at least 1"),
        ({"iou_threshold": 1.5}, "iou_threshold holds 1.5"),
    ],
)
def test_bad_input(change, message):
    arguments = {"boxes": (5, 4), "score_threshold": 0.5, "iou_threshold": 0.5}
    arguments |= {"max_detections": 3, **change}
    boxes = jnp.zeros(arguments.pop("boxes"))
    with pytest.raises(ValueError, match=f"select_detections: {message}"):
        select_detections(boxes, jnp.zeros((5, 2)), **arguments)
