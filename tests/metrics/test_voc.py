"""Pascal VOC's average precision against the loops of its definition."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.metrics import DetectionEvaluator

CLASSES = 3


def overlap(a, b):
    """Intersection over union, in exact numbers of integer boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return Fraction(0)
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return Fraction(shared, sum(areas) - shared)


def definition(images, label, threshold):
    """Both average precisions, from the development kit's loops."""
    truths = {
        image_id: [[box, hard, False] for box, of, hard in zip(*truth, strict=True) if of == label]
        for image_id, (truth, _) in images.items()
    }
    total = sum(not hard for truth in truths.values() for _, hard, _ in truth)
    if total == 0:
        return np.nan, np.nan
    rows = [
        (-score, image_id, number, box)
        for image_id, (_, found) in images.items()
        for number, (box, score, of) in enumerate(zip(*found, strict=True))
        if of == label
    ]
    points, right, wrong = [], 0, 0
    for _, image_id, _, box in sorted(rows, key=lambda row: row[:3]):
        best, whom = Fraction(-1), None
        for truth in truths[image_id]:
            if overlap(box, truth[0]) > best:
                best, whom = overlap(box, truth[0]), truth
        if whom is not None and best >= threshold:
            if whom[1]:
                continue
            right, wrong = right + (not whom[2]), wrong + whom[2]
            whom[2] = True
        else:
            wrong += 1
        points.append((Fraction(right, total), Fraction(right, right + wrong)))

    def best_from(recall):
        return max((precision for r, precision in points if r >= recall), default=Fraction(0))

    eleven = sum(best_from(Fraction(k, 10)) for k in range(11)) / 11
    steps = sorted({Fraction(0)} | {recall for recall, _ in points})
    area = sum((b - a) * best_from(b) for a, b in itertools.pairwise(steps))
    return float(eleven), float(area)


def scenes(seed, images, objects, detections, levels):
    rng = np.random.default_rng(seed)

    def boxes(count):
        low = rng.integers(0, 6, (count, 2))
        return np.concatenate([low, low + rng.integers(0, 6, (count, 2))], axis=1)

    result = {}
    for image_id in rng.permutation(2 * images)[:images].tolist():
        n, m = rng.integers(0, objects + 1), rng.integers(0, detections + 1)
        truth, found = boxes(n), boxes(m)
        # Some objects lie on others, so that detections have a choice.
        for i in range(1, n, 2):
            truth[i] = truth[i - 1] + [0, 0, rng.integers(2), 0]
        for i in np.flatnonzero(rng.random(m) < 0.5 * (n > 0)):
            found[i] = truth[rng.integers(n)] + [0, 0, rng.integers(2), 0]
        labels, guesses = (rng.integers(CLASSES, size=k) for k in (n, m))
        labels[1::2] = labels[: n - n % 2 : 2]
        scores = rng.integers(levels, size=m) / levels
        result[image_id] = (
            (truth.tolist(), labels.tolist(), (rng.random(n) < 0.3).tolist()),
            (found.tolist(), scores.tolist(), guesses.tolist()),
        )
    return result


def evaluator_of(images):
    evaluator = DetectionEvaluator(CLASSES)
    for image_id, ((truth, labels, hard), (found, scores, guesses)) in images.items():
        evaluator.add_image(
            image_id,
            np.array(truth, float).reshape(-1, 4),
            np.array(labels, int),
            ignored=np.array(hard, bool),
        )
        evaluator.add_detections(
            image_id,
            np.array(found, float).reshape(-1, 4),
            np.array(scores, float),
            np.array(guesses, int),
        )
    return evaluator


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**40),
    images=st.integers(1, 7),
    objects=st.sampled_from([0, 2, 8]),
    detections=st.sampled_from([0, 3, 15]),
    levels=st.sampled_from([1, 5, 1000]),
    threshold=st.sampled_from([Fraction(1, 8), Fraction(1, 2)]),
)
def test_equals_the_definition(seed, images, objects, detections, levels, threshold):
    drawn = scenes(seed, images, objects, detections, levels)
    got = evaluator_of(drawn).voc(threshold=float(threshold))
    want = np.array([definition(drawn, label, threshold) for label in range(CLASSES)])
    np.testing.assert_allclose(got.ap_2007, want[:, 0], atol=1e-12)
    np.testing.assert_allclose(got.ap_2010, want[:, 1], atol=1e-12)
    there = want[~np.isnan(want[:, 0])]
    assert len(there) == 0 or got.map_2007 == pytest.approx(there[:, 0].mean(), abs=1e-12)
    assert len(there) == 0 or got.map_2010 == pytest.approx(there[:, 1].mean(), abs=1e-12)


def test_a_ranking_by_hand():
    """Right, wrong, right of three objects, the third not found: areas that can be seen."""
    evaluator = DetectionEvaluator(1)
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], float)
    evaluator.add_image(0, truth, np.zeros(4, int), ignored=np.array([False, False, False, True]))
    found = np.concatenate([truth[[0, 3]], [[0.0, 50.0, 9.0, 59.0]], truth[[1, 0]]])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    evaluator.add_detections(0, found, scores, np.zeros(5, int))
    got = evaluator.voc()
    # Precision 1 up to recall 1/3, then 2/3 up to 2/3, then none; the hard one does not count.
    assert got.map_2010 == pytest.approx(1 / 3 + 2 / 3 / 3)
    assert got.map_2007 == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    recall, precision = got.curves[0]
    np.testing.assert_allclose(recall, [1 / 3, 1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3, 1 / 2])


def test_a_recall_of_three_tenths_is_reached_whatever_rounding_says():
    """3 of 10 objects: 0.1 * 3 is above 0.3 in floating point, and recall 0.3 would be lost."""
    evaluator = DetectionEvaluator(1)
    truth = np.stack([np.arange(10), np.zeros(10), np.arange(10) + 1, np.ones(10)], axis=1)
    evaluator.add_image(0, truth, np.zeros(10, int))
    evaluator.add_detections(0, truth[:3], np.ones(3), np.zeros(3, int))
    assert evaluator.voc().map_2007 == pytest.approx(4 / 11)
    assert evaluator.voc().map_2010 == pytest.approx(3 / 10)


def test_classes_that_do_not_occur_are_nan():
    got = evaluator_of({1: (([[0, 0, 2, 2]], [1], [False]), ([], [], []))}).voc()
    np.testing.assert_array_equal(got.ap_2007, [np.nan, 0, np.nan])
    assert got.map_2007 == got.map_2010 == 0 and len(got.curves[0][0]) == 0
    nothing = evaluator_of({1: (([], [], []), ([[0, 0, 1, 1]], [0.5], [0]))}).voc()
    assert np.isnan(nothing.map_2007) and np.isnan(nothing.map_2010)
