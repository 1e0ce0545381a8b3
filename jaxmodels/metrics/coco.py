"""COCO's average precision and average recall of boxes."""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmodels.metrics.box_tables import (
    Found,
    Objects,
    Pairs,
    falling_precision,
    overlapping_pairs,
    ranks_within,
)

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
# Limits belong to both neighbours, as in pycocotools.
AREAS = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
MAX_DETECTIONS = (1, 10, 100)


@dataclasses.dataclass(frozen=True, eq=False)
class CocoScores:
    """What COCO's evaluation gives; NaN stands where there is no object, as -1 in pycocotools.

    The dimensions are T = 10 thresholds of overlap, 0.5 to 0.95, R = 101 recalls, 0 to 1,
    K classes, A = 4 sizes (all, small, medium, large) and M = 3 maxima (1, 10, 100).

    Attributes:
      ap: mean precision over thresholds, recalls and classes.
      ap50, ap75: the same at one threshold.
      ap_small, ap_medium, ap_large: the same of objects of up to 32 x 32, up to 96 x 96
        and more pixels of area.
      ar1, ar10, ar100: mean recall over thresholds and classes if each image and class
        gives that many detections at most.
      ar_small, ar_medium, ar_large: `ar100` by size.
      class_ap: `ap` of every class.
      precision: interpolated, with 100 detections.
      recall: the largest.
      left_out: detections beyond the best 100 of their image and class, which do not count.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    class_ap: Float[np.ndarray, "K"]
    precision: Float[np.ndarray, "T R K A"]
    recall: Float[np.ndarray, "T K A M"]
    left_out: int

    def figures(self) -> dict[str, float]:
        """The twelve means by name, in COCO's order."""
        names = [field.name for field in dataclasses.fields(self)][:12]
        return {name: getattr(self, name) for name in names}

    def curve(
        self, label: int | None = None, *, threshold: float = 0.5, size: str = "all"
    ) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]:
        """A precision-recall curve, for `plots.precision_recall`.

        Args:
          label: a class; None for the mean of those that occur.
          threshold: of overlap, one of the ten.
          size: "all", "small", "medium" or "large".

        Returns:
          Recalls and precisions; precisions are NaN if there is no object.

        Raises:
          ValueError: no such threshold, size or class.
        """
        classes = self.precision.shape[2]
        place = np.flatnonzero(np.isclose(threshold, IOU_THRESHOLDS))
        if not len(place) or size not in AREAS or (label is not None and not 0 <= label < classes):
            raise ValueError(
                f"CocoScores.curve: no curve for threshold={threshold}, size={size!r} and "
                f"label={label}; thresholds are 0.5, 0.55, ..., 0.95, sizes {', '.join(AREAS)}, "
                f"and there are {classes} classes"
            )
        precision = self.precision[place[0], :, :, list(AREAS).index(size)]
        chosen = precision if label is None else precision[:, [label]]
        there = ~np.isnan(chosen[0])
        return RECALLS, chosen[:, there].mean(axis=1) if there.any() else chosen[:, 0]


def coco_scores(objects: Objects, found: Found, num_classes: int) -> CocoScores:
    """Evaluates all boxes of a data set at once; `DetectionEvaluator.coco` calls this.

    In every image and class, detections by falling score take the object that they
    overlap most and that is still free, if by the threshold or more; of equals the
    later. Objects that do not count (ignored, or of another size) are taken only if no
    other can be, and ignored ones by any number of detections; what takes one of them
    does not count either, and neither does what takes nothing and is of another size.

    Only pairs that overlap by 0.5 are looked at, and the n-th detections of all images
    and classes take their objects together, for all thresholds and sizes: as many
    array operations as detections in the fullest image and class, 100 at most.

    Args:
      objects, found: the boxes.
      num_classes: K.

    Returns:
      Scores, equal to pycocotools' to rounding.

    Source: Lin et al. 2014, "Microsoft COCO" (arXiv:1405.0312); the details are those of
    pycocotools 2.0, `COCOeval` with iouType "bbox".
    """
    best = found.best(MAX_DETECTIONS[-1])
    left_out = len(found.cells) - len(best.cells)
    if left_out:
        warnings.warn(
            f"coco_scores: {left_out} of {len(found.cells)} detections are not among the best "
            f"{MAX_DETECTIONS[-1]} of their image and class and do not count",
            stacklevel=3,
        )
    missing = objects.ignored[:, None] | _outside(objects.areas)
    right, counted = _take(best, objects, missing)
    precision, recall = _accumulate(best, right, counted, objects.labels, ~missing, num_classes)
    sizes = [_mean(precision[..., i]) for i in range(len(AREAS))]
    maxima = [_mean(recall[:, :, 0, i]) for i in range(len(MAX_DETECTIONS))]
    by_size = [_mean(recall[:, :, i, -1]) for i in range(1, len(AREAS))]
    return CocoScores(
        sizes[0],
        *(_mean(precision[place, :, :, 0]) for place in (0, 5)),
        *sizes[1:],
        *maxima,
        *by_size,
        class_ap=precision[..., 0].mean(axis=(0, 1)),
        precision=precision,
        recall=recall,
        left_out=left_out,
    )


def _outside(areas: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N A"]:
    low, high = np.array(list(AREAS.values())).T
    return (areas[:, None] < low[None]) | (areas[:, None] > high[None])


def _take(
    found: Found, objects: Objects, missing: Bool[np.ndarray, "G A"]
) -> tuple[Bool[np.ndarray, "D A T"], Bool[np.ndarray, "D A T"]]:
    """Which detections are right, and which are right or wrong."""
    shape = (len(AREAS), len(IOU_THRESHOLDS))
    taken = np.zeros((len(objects.cells), *shape), bool)
    right = np.zeros((len(found.cells), *shape), bool)
    widths = found.boxes[:, 2:] - found.boxes[:, :2]
    outside = _outside(widths[:, 0] * widths[:, 1])
    counted = np.broadcast_to(~outside[:, :, None], right.shape).copy()
    pairs = overlapping_pairs(found, objects, IOU_THRESHOLDS[0], crowds=True)
    for turn in _turns(pairs, found):
        took, what, which = _choose(turn, objects, missing, taken)
        free = ~missing[what, np.arange(shape[0])[None, :, None]]
        right[which] = took & free
        counted[which] = np.where(took, free, counted[which])
        row, area, threshold = np.nonzero(took)
        taken[what[row, area, threshold], area, threshold] = True
    return right, counted


def _turns(pairs: Pairs, found: Found):
    """The pairs of the first detections that have any, one for each cell; of the second; ..."""
    # By overlap, then by object, so that of equals the last is chosen.
    order = np.lexsort((pairs.objects, pairs.overlaps, pairs.found))
    pairs = Pairs(pairs.found[order], pairs.objects[order], pairs.overlaps[order])
    starts = np.flatnonzero(np.diff(pairs.found, prepend=-1))
    sizes = np.diff(starts, append=len(order))
    turns = np.repeat(ranks_within(found.cells[pairs.found[starts]]), sizes)
    order = np.argsort(turns, kind="stable")
    ends = np.cumsum(np.bincount(turns))
    for part in np.split(order, ends[:-1]):
        yield Pairs(pairs.found[part], pairs.objects[part], pairs.overlaps[part])


def _choose(turn: Pairs, objects: Objects, missing, taken):
    """Whether each detection takes an object (D A T), which one, and which detections these are."""
    starts = np.flatnonzero(np.diff(turn.found, prepend=-1))
    places = np.arange(1, len(turn.found) + 1, dtype=np.int32)
    # Larger is better: objects that count before others, then the order of `_turns`.
    worth = places[:, None] + np.where(missing[turn.objects], 0, len(places)).astype(np.int32)
    enough = turn.overlaps[:, None] >= IOU_THRESHOLDS[None]
    free = ~taken[turn.objects] | objects.ignored[turn.objects][:, None, None]
    worth = np.where(free & enough[:, None], worth[:, :, None], 0)
    best = np.maximum.reduceat(worth, starts, axis=0)
    return best > 0, turn.objects[(best - 1) % len(places)], turn.found[starts]


def _accumulate(found: Found, right, counted, labels, there, num_classes):
    """Interpolated precision (T, R, K, A) and largest recall (T, K, A, M)."""
    areas, thresholds = right.shape[1:]
    precision = np.full((thresholds, len(RECALLS), num_classes, areas), np.nan)
    recall = np.full((thresholds, num_classes, areas, len(MAX_DETECTIONS)), np.nan)
    order, classes = found.by_score(), np.arange(num_classes + 1)
    ends, object_ends = (np.searchsorted(x, classes) for x in (found.labels, labels))
    for label in range(num_classes):
        of_class = order[ends[label] : ends[label + 1]]
        totals = there[object_ends[label] : object_ends[label + 1]].sum(axis=0)
        hits, seen = right[of_class], np.cumsum(counted[of_class], axis=0, dtype=np.int32)
        for area in np.flatnonzero(totals):
            total = int(totals[area])
            for m, most in enumerate(MAX_DETECTIONS):
                within = hits[found.ranks[of_class] < most, area]
                recall[:, label, area, m] = within.sum(axis=0) / total
            precision[:, :, label, area] = _at_recalls(hits[:, area], seen[:, area], total)
    return precision, recall


def _at_recalls(
    hits: Bool[np.ndarray, "D T"], seen: Int[np.ndarray, "D T"], total: int
) -> Float[np.ndarray, "T R"]:
    """Interpolated precision at the 101 recalls; 0 at those that are not reached."""
    needed = np.searchsorted(np.arange(1, total + 1) / total, RECALLS)
    precision = np.zeros((hits.shape[1], len(RECALLS)))
    for row, hit, count in zip(precision, hits.T, seen.T, strict=True):
        falling = falling_precision(np.flatnonzero(hit), count)
        reached = needed < len(falling)
        row[reached] = falling[needed[reached]]
    return precision


def _mean(values: Float[np.ndarray, "*N"]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
