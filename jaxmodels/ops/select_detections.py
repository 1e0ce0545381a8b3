"""From scores of all boxes and classes to the few detections of an image."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmodels.ops.checks import require_within
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.nms import class_wise_nms


def select_detections(
    boxes: Float[Array, "..."],
    scores: Float[Array, "N K"],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    max_candidates: int = 1000,
) -> Detections:
    """The detections of one image: class-wise non-maximum suppression, then the best scores.

    Every pair of a box and a class is a candidate if its score is above the
    threshold; the best of them go through `class_wise_nms`, and the best of those
    kept are returned. A box may come more than once, with different classes. Time
    O(N K + max_candidates max_detections); use `vmap` for a batch.

    Args:
      boxes: (N, 4), xyxy, one for all classes; or (N, K, 4), one for each.
      scores: of K classes, without the background.
      score_threshold: only scores above it count.
      iou_threshold: as of `nms`.
      max_detections: places in the result, filled or not.
      max_candidates: the best pairs beyond this many are not looked at; where more
        are above the threshold, this departs from the papers, which have no limit.

    Returns:
      Detections, best first. Of those that fill no place, `valid` is False, the box
      and the score are zeros, and the class is -1.

    Raises:
      ValueError: shapes disagree, a number of boxes is less than one, or the
        iou_threshold is not in [0, 1].

    Source: Girshick et al. 2014, "Rich feature hierarchies", section 2.2
    (arXiv:1311.2524).
    """
    _check(boxes, scores, max_detections, max_candidates)
    require_within("select_detections", "iou_threshold", iou_threshold, 0, 1)
    num_classes = scores.shape[1]
    eligible = jnp.where(scores > score_threshold, scores, -jnp.inf).reshape(-1)
    scores, places = lax.top_k(eligible, min(max_candidates, eligible.size))
    classes = places % num_classes
    boxes = boxes[places // num_classes] if boxes.ndim == 2 else boxes.reshape(-1, 4)[places]
    keep = class_wise_nms(boxes, scores, classes, iou_threshold)
    spare = max(0, max_detections - len(scores))
    ranks = jnp.pad(jnp.where(keep, scores, -jnp.inf), (0, spare), constant_values=-jnp.inf)
    scores, chosen = lax.top_k(ranks, max_detections)
    valid = scores > -jnp.inf
    return Detections(
        boxes=jnp.where(valid[:, None], boxes.at[chosen].get(mode="fill", fill_value=0), 0),
        scores=jnp.where(valid, scores, 0),
        classes=jnp.where(valid, classes.at[chosen].get(mode="fill", fill_value=-1), -1),
        valid=valid,
    )


def _check(boxes, scores, max_detections: int, max_candidates: int) -> None:
    wanted = (*scores.shape[: boxes.ndim - 1], 4)
    if boxes.shape != wanted:
        raise ValueError(
            f"select_detections: boxes {boxes.shape} do not go with scores {scores.shape} (N, K); "
            f"pass (N, 4), or (N, K, 4) with a box for each class"
        )
    for name, count in (("max_detections", max_detections), ("max_candidates", max_candidates)):
        if count < 1:
            raise ValueError(f"select_detections: {name}={count} must be at least 1")
