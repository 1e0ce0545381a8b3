"""COCO's scores against pycocotools, on scenes full of what is rare."""

import contextlib
import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jaxmodels.metrics import DetectionEvaluator

CLASSES = 3


def boxes(rng, count, step):
    """On a grid of `step`, so that overlaps tie; some have no width, no height or neither."""
    low = rng.integers(0, 8, (count, 2)) * step
    size = rng.integers(0, 7, (count, 2)) * step
    return np.concatenate([low, low + size], axis=1)


def scenes(seed, *, images=5, objects=6, detections=9, step=16.0, levels=4, classes=CLASSES):
    """By image id in any order: boxes, labels, ignored, areas; boxes, scores, labels."""
    rng = np.random.default_rng(seed)
    result = {}
    for image_id in rng.permutation(3 * images)[:images].tolist():
        n, m = rng.integers(0, objects + 1), rng.integers(0, detections + 1)
        truth = boxes(rng, n, step)
        found = boxes(rng, m, step)
        # Most detections are shifted copies.
        for i in np.flatnonzero(rng.random(m) < 0.7 * (n > 0)):
            found[i] = truth[rng.integers(n)] + rng.integers(-1, 2) * step * np.array([0, 0, 1, 1])
            found[i, 2:] = np.maximum(found[i, 2:], found[i, :2])
        # Annotated areas are those of outlines, and some sit on the limits of a size.
        own = np.prod(truth[:, 2:] - truth[:, :2], axis=1)
        areas = np.where(rng.random(n) < 0.5, own, rng.choice([0, 900, 1024, 9216, 1e10, 2e10], n))
        result[image_id] = (
            (truth, rng.integers(classes, size=n), rng.random(n) < 0.25, areas),
            (found, rng.integers(levels, size=m) / levels, rng.integers(classes, size=m)),
        )
    return result


def pycocotools_scores(scenes, classes=CLASSES):
    def annotations(image_id, boxes, labels, **columns):
        for i, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            row = {"image_id": image_id, "category_id": label, "bbox": bbox}
            yield row | {name: column[i].item() for name, column in columns.items()}

    def index(rows):
        coco = COCO()
        for number, row in enumerate(rows, start=1):  # pycocotools takes an id of 0 for no match
            row["id"] = number
        images = [{"id": image_id} for image_id in scenes]
        categories = [{"id": label} for label in range(classes)]
        coco.dataset = {"images": images, "categories": categories, "annotations": rows}
        coco.createIndex()
        return coco

    true, found = [], []
    for image_id, ((boxes, labels, ignored, areas), (its, scores, guesses)) in scenes.items():
        true += annotations(image_id, boxes, labels, iscrowd=ignored, area=areas)
        areas = (its[:, 2] - its[:, 0]) * (its[:, 3] - its[:, 1])
        found += annotations(image_id, its, guesses, score=scores, area=areas)
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(index(true), index(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def evaluator_of(scenes, classes=CLASSES):
    evaluator = DetectionEvaluator(classes)
    for image_id, ((boxes, labels, ignored, areas), found) in scenes.items():
        evaluator.add_image(image_id, boxes, labels, ignored=ignored, areas=areas)
        if len(found[0]):
            evaluator.add_detections(image_id, *found)
    return evaluator


def assert_equals_pycocotools(scenes, classes=CLASSES):
    judge = pycocotools_scores(scenes, classes)
    got = evaluator_of(scenes, classes).coco()
    stats, precision, recall = (
        np.where(x == -1, np.nan, x)
        for x in (judge.stats, judge.eval["precision"][..., -1], judge.eval["recall"])
    )
    close = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(got.precision, precision, **close)
    np.testing.assert_allclose(got.recall, recall, **close)
    np.testing.assert_allclose(list(got.figures().values()), stats, **close)
    np.testing.assert_allclose(got.class_ap, precision[..., 0].mean(axis=(0, 1)), **close)
    return got


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**40),
    images=st.integers(1, 6),
    objects=st.sampled_from([0, 2, 9]),
    detections=st.sampled_from([0, 3, 20]),
    step=st.sampled_from([4.0, 12.5, 16.0]),
    levels=st.sampled_from([1, 4, 1000]),
)
def test_equals_pycocotools(seed, **options):
    assert_equals_pycocotools(scenes(seed, **options))


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools_in_crowded_images_of_one_class(seed):
    """Many detections want the same objects, and more than 100 are cut to the best 100."""
    crowded = scenes(seed, images=3, objects=40, detections=300, classes=1)
    counts = [len(found[0]) for _, found in crowded.values()]
    left_out = sum(max(count - 100, 0) for count in counts)
    assert left_out
    message = rf"{left_out} of {sum(counts)} detections are not among the best 100 of"
    with pytest.warns(UserWarning, match=message):
        got = assert_equals_pycocotools(crowded, 1)
    assert got.left_out == left_out
    assert got.ar1 < got.ar10 < got.ar100


def test_a_million_pairs_are_looked_at_in_parts(monkeypatch):
    crowded = scenes(7, images=5, objects=9, detections=20)
    whole = evaluator_of(crowded).coco()
    monkeypatch.setattr("jaxmodels.metrics.box_tables._PAIRS_AT_ONCE", 3)
    np.testing.assert_array_equal(evaluator_of(crowded).coco().precision, whole.precision)


def test_perfect_detections_by_hand():
    evaluator = DetectionEvaluator(2)
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    evaluator.add_image(3, box, np.array([1]))
    evaluator.add_image(5, np.zeros((0, 4)), np.zeros(0, int))
    evaluator.add_detections(3, box, np.array([0.5]), np.array([1]))
    scores = evaluator.coco()
    assert scores.ap == scores.ap50 == scores.ap_small == scores.ar1 == 1
    assert np.isnan(scores.ap_large) and np.isnan(scores.class_ap[0]) and scores.class_ap[1] == 1
    assert list(scores.figures())[:4] == ["ap", "ap50", "ap75", "ap_small"]
    evaluator.add_detections(5, box, np.array([0.7]), np.array([1]))
    assert evaluator.coco().ap == 0.5


def test_curves_are_rows_of_the_precision():
    scores = evaluator_of(scenes(1, images=6)).coco()
    recalls, precision = scores.curve(1, threshold=0.75, size="small")
    np.testing.assert_array_equal(precision, scores.precision[5, :, 1, 1])
    np.testing.assert_allclose(recalls, np.arange(101) / 100, atol=1e-12)
    np.testing.assert_allclose(scores.curve()[1].mean(), scores.ap50, atol=1e-12)
    nothing = evaluator_of({4: scenes(1)[next(iter(scenes(1)))]}, 9).coco()
    assert np.isnan(nothing.curve(8)[1]).all() and len(nothing.curve()[1]) == 101
    for wrong in ({"threshold": 0.52}, {"size": "huge"}, {"label": 3}):
        with pytest.raises(ValueError, match=r"CocoScores\.curve: no curve for"):
            scores.curve(**wrong)


def test_nothing_but_empty_images_scores_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluator_of(scenes(0, objects=0, detections=0)).coco()
    assert np.isnan(list(scores.figures().values())).all()
