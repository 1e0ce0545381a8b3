"""Which anchor or point of an image is to find which of its objects.

Objects fill N places, of which `valid` are taken; where none is, as in images without
objects, everything is background.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.box_coding import encode_distances
from jaxmodels.ops.boxes import box_area, require_boxes, xyxy_to_cxcywh
from jaxmodels.ops.checks import require_shape

BACKGROUND, IGNORED = -1, -2


def match_by_threshold(
    overlaps: Float[Array, "A N"],
    valid: Bool[Array, "..."],
    *,
    positive: float,
    negative: float,
    rescue: bool = True,
) -> Int[Array, "A"]:
    """Gives each anchor the object that it overlaps most, if it does enough.

    out[a] = argmax_n overlaps[a, n]  where the maximum is >= positive, or a is among
             the best anchors of any object (rescue); else
             -1 where it is < negative; else -2

    A rescued anchor, too, gets the object that it overlaps most, which need not be the
    one that it is the best for. Of equal overlaps the first object is taken.

    Args:
      overlaps: of anchors with objects, from `pairwise_iou`.
      valid: (N,), which objects there are.
      positive, negative: thresholds.
      rescue: whether the anchors with the largest overlap of an object, all of them
        if they are several, are positive even below the threshold.

    Returns:
      The index of an object, -1 for background or -2 for neither.

    Raises:
      ValueError: not 0 <= negative <= positive <= 1, or shapes disagree.

    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.2 (arXiv:1506.01497), as
    torchvision does it, except that an object which no anchor touches rescues none
    (there, all of them).
    """
    _check_thresholds(positive, negative)
    anchors, count = overlaps.shape
    require_shape("match_by_threshold", "valid", valid, (count,), "(N,)")
    if not count:
        return jnp.full(anchors, BACKGROUND)
    overlaps = jnp.where(valid[None, :], overlaps, -1)
    best = overlaps.max(axis=1)
    taken = best >= positive
    if rescue:
        of_object = overlaps.max(axis=0, keepdims=True)
        taken |= ((overlaps == of_object) & (of_object > 0)).any(axis=1)
    rest = jnp.where(best < negative, BACKGROUND, IGNORED)
    return jnp.where(taken, overlaps.argmax(axis=1), rest)


def centre_sampling(
    points: Float[Array, "A 2"],
    boxes: Float[Array, "N 4"],
    valid: Bool[Array, "..."],
    *,
    strides: Float[Array, "..."],
    size_ranges: Float[Array, "..."],
    radius: float | int | None = 1.5,
) -> Int[Array, "A"]:
    """Gives each point the smallest object that it lies in the middle of.

    Point a may find object n if it is inside the box; if both |x - x_n| and |y - y_n|
    are < radius strides[a], for (x_n, y_n) the box's centre; and if the largest of its
    distances to the four sides is within size_ranges[a].

    Args:
      points: (x, y) of all levels of a pyramid, one after the other.
      boxes: of the objects.
      valid: (N,), which objects there are.
      strides: (A,), of the level of each point, in pixels.
      size_ranges: (A, 2), smallest and largest distance that the level of each point
        is for, both included.
      radius: in strides; None lets points anywhere in the box find it.

    Returns:
      The index of an object, or -1 for background. Of objects of equal area the
      first is taken.

    Raises:
      ValueError: the radius is not positive, shapes disagree, or a box has a negative
        size or is not finite.

    Source: Tian et al. 2019, "FCOS", sections 3.1 and 3.2 (arXiv:1904.01355); the
    centres from Tian et al. 2020, section 2.1 (arXiv:2006.09214).
    """
    name, count = "centre_sampling", len(points)
    if radius is not None and radius <= 0:
        raise ValueError(f"{name}: radius={radius} must be positive, or None for whole boxes")
    require_shape(name, "valid", valid, (len(boxes),), "(N,)")
    require_shape(name, "strides", strides, (count,), "(A,)")
    require_shape(name, "size_ranges", size_ranges, (count, 2), "(A, 2)")
    require_boxes(name, "boxes", boxes)
    if not len(boxes):
        return jnp.full(count, BACKGROUND)
    sides = encode_distances(points[:, None], boxes[None])
    low, high = size_ranges[:, :1], size_ranges[:, 1:]
    farthest = sides.max(axis=-1)
    may = valid[None] & (sides.min(axis=-1) > 0) & (farthest >= low) & (farthest <= high)
    if radius is not None:
        apart = jnp.abs(points[:, None] - xyxy_to_cxcywh(boxes)[None, :, :2])
        may &= apart.max(axis=-1) < radius * strides[:, None]
    areas = jnp.where(may, box_area(boxes)[None], jnp.inf)
    return jnp.where(may.any(axis=1), areas.argmin(axis=1), BACKGROUND)


def _check_thresholds(positive: float, negative: float) -> None:
    if not 0 <= negative <= positive <= 1:
        raise ValueError(
            f"match_by_threshold: positive={positive} and negative={negative} must be in order, "
            f"0 <= negative <= positive <= 1"
        )
