"""Nothing is dropped, and what fills up is marked."""

import dataclasses

import numpy as np
import pytest

from jaxmodels.data import digit_scenes, evaluation_batches
from jaxmodels.metrics import DetectionEvaluator
from jaxmodels.ops.detections import Detections


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Examples that are their place, drawn from if asked."""

    groups: np.ndarray

    def __len__(self):
        return len(self.groups)

    def batch(self, indices, rng):
        return {"number": indices, "drawn": rng.random(len(indices))}


def test_every_example_comes_once_group_by_group():
    dataset = Numbered(np.array([2, 0, 0, 2, 2, 0, 2, 2]))
    stream = list(evaluation_batches(dataset, 3))
    assert [batch["number"].tolist() for batch in stream] == [[1, 2, 5], [0, 3, 4], [6, 7, 7]]
    assert [batch["filler"].tolist() for batch in stream[1:]] == [[False] * 3, [False, False, True]]
    np.testing.assert_array_equal(stream[2]["image_id"], stream[2]["number"])
    again = list(evaluation_batches(dataset, 3))
    np.testing.assert_array_equal(again[2]["drawn"], stream[2]["drawn"])


def test_digit_scenes_are_judged_whole():
    scenes = digit_scenes("test", size=7, canvas=(24, 24), count=(1, 2), scale=(1.0, 2.0))
    evaluator = DetectionEvaluator(len(scenes.class_names))
    for batch in evaluation_batches(scenes, 3):
        labels = batch["box_labels"]
        scores = np.where(labels >= 0, 0.5, 0.0)
        evaluator.add_batch(Detections(batch["boxes"], scores, labels, labels >= 0), batch)
    assert evaluator.coco().ap == evaluator.voc().map_2010 == pytest.approx(1)
    assert evaluator.coco().left_out == 0
    with pytest.raises(ValueError, match="image 4 was added before"):
        evaluator.add_image(4, np.zeros((0, 4)), np.zeros(0, int))
    with pytest.raises(ValueError, match="image 7 is not in the ground truth"):
        evaluator.add_detections(7, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))


def test_impossible_requests_are_named():
    dataset = Numbered(np.zeros(3, int))
    with pytest.raises(ValueError, match="evaluation_batches: batch_size=0 for 3 examples; both"):
        evaluation_batches(dataset, 0)
    with pytest.raises(ValueError, match="batch_size=2 for 0 examples; both must be at least 1"):
        evaluation_batches(Numbered(np.zeros(0, int)), 2)
