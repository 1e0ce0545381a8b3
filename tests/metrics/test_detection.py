"""What an evaluator takes, from arrays and from batches, and what it refuses."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmodels.metrics import DetectionEvaluator
from jaxmodels.ops.detections import Detections

BOX = np.array([[2.0, 3.0, 13.0, 10.0]])
ONE, HALF = np.array([1]), np.array([0.5])


@pytest.fixture
def evaluator():
    evaluator = DetectionEvaluator(3)
    evaluator.add_image(7, BOX, ONE)
    return evaluator


@pytest.fixture
def production(monkeypatch):
    """Without the suite's shape checks, as users run it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def batch_and_detections():
    """Two images, one object each and one crowd; the first is found, and so is padding."""
    boxes = np.zeros((3, 2, 4), np.float32)
    boxes[0] = [[0, 0, 20, 10], [0, 0, 8, 6]]
    boxes[1, 0] = [10, 10, 50, 40]
    batch = {
        "boxes": boxes,
        "box_labels": np.array([[2, 1], [0, -1], [-1, -1]]),
        "box_ignored": np.array([[False, True], [False, False], [False, False]]),
        "image_id": np.array([11, 5, 5]),
        "area": np.array([[2000.0, 5.0], [500.0, 0.0], [0.0, 0.0]]),
        "scale": np.array([[0.5, 2.0], [1.0, 1.0], [1.0, 1.0]]),
        "filler": np.array([False, False, True]),
    }
    found = np.tile(np.array([[0.0, 0, 20, 10]], np.float32), (3, 2, 1))
    detections = Detections(
        jnp.array(found),
        jnp.array([[0.9, 0.0], [0.4, 0.0], [0.9, 0.9]]),
        jnp.array([[2, -1], [2, -1], [2, 2]]),
        jnp.array([[True, False], [True, False], [True, True]]),
    )
    return batch, detections


def test_a_batch_is_its_images_in_original_pixels():
    batch, detections = batch_and_detections()
    whole, single = DetectionEvaluator(3), DetectionEvaluator(3)
    whole.add_batch(detections, batch)
    single.add_image(
        11,
        np.array([[0.0, 0, 10, 20], [0, 0, 4, 12]]),
        np.array([2, 1]),
        ignored=np.array([False, True]),
        areas=np.array([2000.0, 5.0]),
    )
    single.add_image(5, np.array([[10.0, 10, 50, 40]]), np.array([0]), areas=np.array([500.0]))
    single.add_detections(11, np.array([[0.0, 0, 10, 20]]), np.array([0.9]), np.array([2]))
    single.add_detections(5, np.array([[0.0, 0, 20, 10]]), np.array([0.4]), np.array([2]))
    got, want = whole.coco(), single.coco()
    np.testing.assert_array_equal(got.precision, want.precision)
    np.testing.assert_array_equal(got.recall, want.recall)
    assert got.ap == 0.5 and got.ap_medium == 1 and got.ap_small == 0
    assert np.isnan(got.class_ap[1])  # only a crowd
    assert whole.voc().map_2010 == single.voc().map_2010 == 0.5


def test_a_batch_without_extras_is_numbered_as_it_comes():
    batch, detections = batch_and_detections()
    plain = {name: batch[name][:2] for name in ("boxes", "box_labels")}
    found = Detections(*(part[:2] for part in detections))
    evaluator = DetectionEvaluator(3)
    evaluator.add_batch(found, plain)
    evaluator.add_batch(found, plain)
    scores = evaluator.coco()
    assert scores.class_ap[2] == pytest.approx(1) and scores.class_ap[0] == 0
    assert scores.class_ap[1] == 0  # nothing says that it is a crowd


def test_order_of_adding_does_not_matter_but_ids_do():
    """Equal scores count in the order of ids: a right one in image 1 comes before a wrong one."""
    for ids, want in (((1, 2), 1.0), ((2, 1), 0.5)):
        evaluator = DetectionEvaluator(1)
        right, wrong = ids
        for image_id in (2, 1):
            there = image_id == right
            evaluator.add_image(image_id, BOX[: int(there)], np.zeros(int(there), int))
        for image_id in (wrong, right):
            evaluator.add_detections(image_id, BOX, HALF, np.array([0]))
        assert evaluator.coco().ap50 == pytest.approx(want)
        assert evaluator.voc().map_2010 == pytest.approx(want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.add_image(7, BOX, ONE), "image 7 was added before; image ids must be unique"),
        (lambda e: e.add_image(8, BOX, np.array([3])), r"image 8: label 3 is outside \[0, 2\]"),
        (lambda e: e.add_image(8, BOX, np.array([-1])), r"label -1 is outside \[0, 2\]"),
        (lambda e: e.add_image(8, BOX * np.nan, ONE), "boxes hold NaN or infinity"),
        (lambda e: e.add_image(8, BOX[:, ::-1], ONE), r"box \[10.0, 13.0, 3.0, 2.0\] has a neg"),
        (lambda e: e.add_image(8, BOX[0], ONE), r"boxes of shape \(4,\) must be \(N, 4\)"),
        (lambda e: e.add_image(8, BOX, np.array([1, 1])), r"labels of shape \(2,\) for 1 boxes"),
        (lambda e: e.add_image(8, BOX, ONE, areas=-HALF), "areas holds -0.5; give finite ones"),
        (lambda e: e.add_image(8, BOX, ONE, areas=HALF * np.nan), "areas holds nan"),
        (
            lambda e: e.add_image(8, BOX, ONE, ignored=np.zeros(2, bool)),
            r"ignored of shape \(2,\) for 1 boxes",
        ),
        (lambda e: e.add_detections(8, BOX, HALF, ONE), "image 8 is not in the ground truth; add"),
        (lambda e: e.add_detections(7, BOX, HALF * np.nan, ONE), "image 7: 1 scores are NaN"),
        (lambda e: e.add_detections(7, BOX, HALF, np.array([4])), r"label 4 is outside \[0, 2\]"),
        (lambda e: e.add_detections(7, -BOX, HALF, ONE), "has a negative size; give xyxy, not xy"),
        (lambda e: e.add_detections(7, BOX * np.inf, HALF, ONE), "boxes hold NaN or infinity"),
        (lambda e: e.add_detections(7, BOX, np.ones(2), ONE), r"scores of shape \(2,\) for 1 box"),
        (lambda e: e.voc(threshold=0.0), r"voc: threshold=0.0 is outside \(0, 1\]"),
    ],
)
def test_bad_input_is_named(evaluator, production, call, message):
    with pytest.raises(ValueError, match=message):
        call(evaluator)
    assert evaluator.coco().recall.shape == (10, 3, 4, 3)  # and nothing of it was kept
    evaluator.add_image(8, BOX, ONE)


def test_detections_are_added_once(evaluator):
    evaluator.add_detections(7, BOX, HALF, ONE)
    with pytest.raises(ValueError, match="image 7 has detections already; add all of an image"):
        evaluator.add_detections(7, BOX, HALF, ONE)


def test_batches_that_do_not_agree_or_lack_objects_are_named():
    batch, detections = batch_and_detections()
    evaluator = DetectionEvaluator(3)
    with pytest.raises(ValueError, match="detections of 2 images for a batch of 3"):
        evaluator.add_batch(Detections(*(part[:2] for part in detections)), batch)
    with pytest.raises(ValueError, match=r"lacks boxes that did not fit .* train=False"):
        evaluator.add_batch(detections, batch | {"boxes_left_out": np.array([0, 2, 0])})
    evaluator.add_batch(detections, batch | {"boxes_left_out": np.zeros(3, int)})


def test_nothing_to_judge_is_named():
    for judge in (DetectionEvaluator(3).coco, DetectionEvaluator(3).voc):
        with pytest.raises(ValueError, match="no image was added, so there is nothing to judge"):
            judge()
    with pytest.raises(ValueError, match="num_classes=0; give at least 1"):
        DetectionEvaluator(0)
