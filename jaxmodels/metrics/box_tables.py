"""All boxes of a data set in flat arrays, and which of the found overlap which of the true."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

# Pairs that are looked at together, 150 MB of temporaries.
_PAIRS_AT_ONCE = 1_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Objects:
    """The true boxes, ordered by class, image and the order in which they came.

    Attributes:
      cells: class * number of images + place of the image among all, so that boxes of one
        cell may match.
      labels: the classes.
      boxes: xyxy.
      areas: what size groups go by.
      ignored: whether finding the box is neither right nor wrong.
    """

    cells: Int64[np.ndarray, "G"]
    labels: Int64[np.ndarray, "G"]
    boxes: Float64[np.ndarray, "G 4"]
    areas: Float64[np.ndarray, "G"]
    ignored: Bool[np.ndarray, "G"]

    @classmethod
    def of(cls, num_images, images, labels, boxes, areas, ignored) -> "Objects":
        """Orders boxes that came in any order; `images` are places among all images."""
        order = np.lexsort((images, labels))
        columns = (labels * num_images + images, labels, boxes, areas, ignored)
        return cls(*(column[order] for column in columns))


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The boxes that a detector gave, ordered by class, image, falling score, then as they came.

    Attributes:
      cells: as of `Objects`.
      labels: the classes.
      boxes: xyxy.
      scores: how sure the detector was.
      ranks: 0 for the best of its cell, and so on.
    """

    cells: Int64[np.ndarray, "D"]
    labels: Int64[np.ndarray, "D"]
    boxes: Float64[np.ndarray, "D 4"]
    scores: Float64[np.ndarray, "D"]
    ranks: Int64[np.ndarray, "D"]

    @classmethod
    def of(cls, num_images, images, labels, boxes, scores) -> "Found":
        """Orders boxes that came in any order; `images` are places among all images."""
        order = np.lexsort((-scores, images, labels))
        cells, labels = (labels * num_images + images)[order], labels[order]
        return cls(cells, labels, boxes[order], scores[order], ranks_within(cells))

    def best(self, count: int) -> "Found":
        """The first `count` of every cell."""
        kept = self.ranks < count
        columns = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Found(*(column[kept] for column in columns))

    def by_score(self) -> Int64[np.ndarray, "D"]:
        """The order by class and falling score; of equals the earlier image first."""
        return np.lexsort((-self.scores, self.labels))


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Found and true boxes of one cell that overlap, ordered by found, then by true box.

    Attributes:
      found, objects: places in `Found` and `Objects`.
      overlaps: intersection over union.
    """

    found: Int64[np.ndarray, "P"]
    objects: Int64[np.ndarray, "P"]
    overlaps: Float64[np.ndarray, "P"]


def overlapping_pairs(
    found: Found, objects: Objects, least: float, *, crowds: bool = False
) -> Pairs:
    """All pairs of one image and class whose overlap is at least `least`.

    A million pairs at once, so memory does not grow with the number of pairs that
    hardly overlap.

    Args:
      found, objects: the boxes.
      least: above 0.
      crowds: take the share of the found box inside an ignored object in place of
        intersection over union, as COCO does.
    """
    first = np.searchsorted(objects.cells, found.cells, "left")
    counts = np.searchsorted(objects.cells, found.cells, "right") - first
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for part in _parts(counts):
        which = np.repeat(np.arange(len(counts))[part], counts[part])
        whom = np.repeat(first[part], counts[part]) + ranks_within(which)
        overlaps = _overlaps(found.boxes[which], objects.boxes[whom], objects.ignored[whom], crowds)
        near = overlaps >= least
        parts.append((which[near], whom[near], overlaps[near]))
    return Pairs(*map(np.concatenate, zip(*parts, strict=True)))


def ranks_within(groups: Int[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
    """The place of every element within its run of equals: 0, 1, ..."""
    places = np.arange(len(groups))
    starts = np.diff(groups, prepend=-1) != 0
    return places - np.maximum.accumulate(np.where(starts, places, 0))


def falling_precision(
    right: Int[np.ndarray, "R"], counted: Int[np.ndarray, "N"]
) -> Float64[np.ndarray, "R"]:
    """The best precision from each right detection on, by which average precision interpolates.

    Precision rises only at right detections, so the others need no look.

    Args:
      right: places of the right ones among all by falling score.
      counted: how many of the first 1, 2, ... are right or wrong.
    """
    precision = np.arange(1, len(right) + 1) / counted[right]
    return np.maximum.accumulate(precision[::-1])[::-1]


def _parts(counts: Int[np.ndarray, "D"]) -> Iterator[slice]:
    """Slices of found boxes that have about a million pairs each."""
    total = np.cumsum(counts)
    pairs = int(total[-1]) if len(total) else 0
    cuts = np.searchsorted(total, np.arange(0, max(pairs, 1), _PAIRS_AT_ONCE), "right")
    for low, high in zip(cuts, [*cuts[1:], len(counts)], strict=True):
        yield slice(int(low), int(high))


def _overlaps(a, b, ignored, crowds) -> Float64[np.ndarray, "P"]:
    """Boxes without an area overlap nothing."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    of_a, of_b = (np.prod(box[:, 2:] - box[:, :2], axis=1) for box in (a, b))
    union = of_a + of_b - shared
    if crowds:
        union = np.where(ignored, of_a, union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
