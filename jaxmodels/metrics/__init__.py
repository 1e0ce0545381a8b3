"""Measures of results; they know no model."""

from jaxmodels.metrics.classification import top_k_accuracy
from jaxmodels.metrics.coco import CocoScores
from jaxmodels.metrics.detection import DetectionEvaluator
from jaxmodels.metrics.frechet import frechet_distance
from jaxmodels.metrics.neighbours import nearest_neighbour_distances
from jaxmodels.metrics.samples import SampleJudge
from jaxmodels.metrics.segmentation import (
    SegmentationScores,
    confusion_matrix,
    segmentation_scores,
)
from jaxmodels.metrics.voc import VocScores

__all__ = [
    "CocoScores",
    "DetectionEvaluator",
    "SampleJudge",
    "SegmentationScores",
    "VocScores",
    "confusion_matrix",
    "frechet_distance",
    "nearest_neighbour_distances",
    "segmentation_scores",
    "top_k_accuracy",
]
