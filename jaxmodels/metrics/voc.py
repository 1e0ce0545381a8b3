"""Pascal VOC's average precision of boxes, by both of its rules."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxmodels.metrics.box_tables import (
    Found,
    Objects,
    falling_precision,
    overlapping_pairs,
)


@dataclasses.dataclass(frozen=True, eq=False)
class VocScores:
    """Average precision by class; NaN where no object of the class counts.

    Attributes:
      map_2007, map_2010: means over classes that occur.
      ap_2007: mean of the interpolated precision at the recalls 0, 0.1, ..., 1.
      ap_2010: area under the interpolated curve, used from 2010 on.
      curves: for every class recall and precision after each detection that counts, for
        `plots.precision_recall`; both empty where there is none.
    """

    map_2007: float
    map_2010: float
    ap_2007: Float[np.ndarray, "K"]
    ap_2010: Float[np.ndarray, "K"]
    curves: tuple[tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]], ...]


def voc_scores(
    objects: Objects, found: Found, num_classes: int, *, threshold: float = 0.5
) -> VocScores:
    """Evaluates all boxes of a data set at once; `DetectionEvaluator.voc` calls this.

    A detection looks at the object of its image and class that it overlaps most, of
    equals the first. It is right if the overlap is at least `threshold` and no better
    detection chose the same object, it does not count if that object is a difficult
    one, and else it is wrong. With p(r) the largest precision at any recall >= r,

    AP_2007 = 1/11 sum over r in {0, 0.1, ..., 1} of p(r)    AP_2010 = integral of p(r) dr

    Recalls are compared as integers, so no rounding decides whether 0.3 is reached.

    Args:
      objects, found: the boxes; `ignored` means difficult.
      num_classes: K.
      threshold: overlap of a right detection.

    Returns:
      Scores.

    Source: Everingham et al. 2010, "The Pascal Visual Object Classes (VOC) Challenge",
    section 4.2; the VOC2010 development kit, section 3.4.1. Its boxes hold both end
    pixels; ours end where the last pixel ends (`data.voc_detection` makes it so), which
    gives the same overlaps.
    """
    chosen = _chosen_objects(found, objects, threshold)
    order = found.by_score()
    chosen = chosen[order]
    _, firsts = np.unique(chosen, return_index=True)
    right = np.zeros(len(order), bool)
    right[firsts] = True
    easy = np.append(~objects.ignored, True)  # the last is what nothing was chosen leads to
    counted, right = easy[chosen], right & (chosen >= 0)
    ends = np.searchsorted(found.labels, np.arange(num_classes + 1))
    results = []
    for label in range(num_classes):
        mine = slice(ends[label], ends[label + 1])
        hits = right[mine][counted[mine]]
        results.append(_class_scores(hits, np.sum(easy[:-1] & (objects.labels == label))))
    ap_2007, ap_2010, curves = zip(*results, strict=True)
    ap_2007, ap_2010 = np.array(ap_2007), np.array(ap_2010)
    return VocScores(_mean(ap_2007), _mean(ap_2010), ap_2007, ap_2010, curves)


def _chosen_objects(found: Found, objects: Objects, threshold: float) -> Int[np.ndarray, "D"]:
    """The object that each detection overlaps most, -1 if none by the threshold."""
    pairs = overlapping_pairs(found, objects, threshold)
    order = np.lexsort((pairs.objects, -pairs.overlaps, pairs.found))
    which, firsts = np.unique(pairs.found[order], return_index=True)
    chosen = np.full(len(found.cells), -1)
    chosen[which] = pairs.objects[order[firsts]]
    return chosen


def _class_scores(hits, total):
    """Both average precisions and the curve, of detections that count by falling score."""
    if not total:
        return np.nan, np.nan, (np.zeros(0), np.zeros(0))
    counted = np.arange(1, len(hits) + 1)
    falling = falling_precision(np.flatnonzero(hits), counted)
    # The first right detection that reaches k / 10, of objects that are `total`.
    needed = np.maximum(-(-np.arange(11) * total // 10), 1) - 1
    eleven = np.append(falling, 0.0)[np.minimum(needed, len(falling))]
    rights = np.cumsum(hits)
    return eleven.mean(), falling.sum() / total, (rights / total, rights / counted)


def _mean(values: Float[np.ndarray, "K"]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
