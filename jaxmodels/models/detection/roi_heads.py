"""What the heads of two-stage detectors share: which RoIs they learn from, what, and how.

A head gives each RoI K + 1 logits, of the background and then of the classes, and
D times four deltas: D is 1 if all classes share them, or K + 1, one set a logit,
of which the background's is never used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodels.models.detection.region_proposals import (
    SMOOTH_L1_CORNER,
    Proposals,
    match_regions,
)
from jaxmodels.ops.box_coding import decode_deltas, encode_deltas
from jaxmodels.ops.box_sampling import hardest, sample_rois
from jaxmodels.ops.boxes import clip_boxes
from jaxmodels.ops.detection_losses import smooth_l1
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.select_detections import select_detections

# One over the deviations by which Fast R-CNN's authors divide the deltas.
ROI_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# Pixels of a box's side, below which it is left out, as in torchvision.
_MIN_SIDE = 1e-2


class RoITargets(NamedTuple):
    """RoIs and what a head should say of them.

    Attributes:
      rois: xyxy in pixels.
      labels: 0 is the background and k + 1 class k; -1 does not count.
      deltas: from the RoI to its object; zero where there is none.
    """

    rois: Float[Array, "B R 4"]
    labels: Int[Array, "B R"]
    deltas: Float[Array, "B R 4"]


def roi_targets(
    proposals: Proposals,
    boxes: Float[Array, "B N 4"],
    box_labels: Int[Array, "B N"],
    there: Bool[Array, "B N"],
    ignored: Bool[Array, "B N"],
    *,
    threshold: float = 0.5,
) -> RoITargets:
    """Says of each proposal which object it shows: the one it overlaps most, if enough.

    The true boxes join the proposals, so that the head sees them from the first step.

    Args:
      proposals: P an image.
      boxes: of the objects.
      box_labels: their classes, from 0; -2 for objects that are not to be learned:
        RoIs that show them do not count.
      there: which boxes are objects.
      ignored: which boxes are neither objects nor background.
      threshold: least intersection over union that makes an object; below is background.

    Returns:
      What a head should say of R = P + N RoIs.

    Source: Girshick 2015, "Fast R-CNN", section 2.3 (arXiv:1504.08083), without
    the lower bound of 0.1 for background, as Ren et al. and later authors.
    """

    def one(rois, candidates, boxes, box_labels, there, ignored):
        matches = match_regions(rois, boxes, there, ignored, threshold, threshold, rescue=False)
        found, which = matches >= 0, jnp.maximum(matches, 0)
        labels = jnp.where(found, box_labels[which] + 1, 0)
        counted = candidates & (matches >= -1)
        matched = jnp.where(found[:, None], boxes[which], rois)
        deltas = encode_deltas(matched, rois, weights=ROI_WEIGHTS)
        return RoITargets(rois, jnp.where(counted, labels, -1), deltas)

    rois = jnp.concatenate([proposals.boxes, boxes], axis=1)
    candidates = jnp.concatenate([proposals.valid, there], axis=1)
    return jax.vmap(one)(rois, candidates, boxes, box_labels, there, ignored)


def sample_targets(
    key: Key[Array, ""], targets: RoITargets, count: int, positive_share: float
) -> RoITargets:
    """Draws the RoIs of each image that a step learns from.

    Args:
      key: of the draw.
      targets: of all RoIs.
      count: how many to draw an image; where there are fewer, labels are -1.
      positive_share: most that may be objects; background fills up.

    Returns:
      The drawn ones, R = count.

    Source: Girshick 2015, "Fast R-CNN", section 2.3 (arXiv:1504.08083).
    """

    def one(key, targets):
        chosen, _, valid = sample_rois(key, targets.labels - 1, count, positive_share)
        rois, labels, deltas = (field[chosen] for field in targets)
        return RoITargets(rois, jnp.where(valid, labels, -1), deltas)

    return jax.vmap(one)(jax.random.split(key, len(targets.rois)), targets)


def roi_losses(
    logits: Float[Array, "B R K"],
    deltas: Float[Array, "B R D 4"],
    targets: RoITargets,
    *,
    num_hardest: int | None = None,
) -> dict[str, Float[Array, ""]]:
    """Cross-entropy of the classes, and smooth L1 of the deltas of objects.

    L = 1 / R sum_r [-log p_r(label) + [label > 0] sum_i smooth_l1(d_ri - target_ri)]

    Both are divided by the number of RoIs that count. With `num_hardest`, those
    are the ones of each image whose sum of both losses is largest (online hard
    example mining); no gradient reaches the others.

    Args:
      logits: of the background and the classes.
      deltas: D is 1, or the number of logits.
      targets: of the same RoIs.
      num_hardest: how many RoIs of an image to learn from; None takes all.

    Returns:
      "roi_classes" and "roi_boxes".

    Raises:
      ValueError: D is something else.

    Source: Girshick 2015, "Fast R-CNN", equations 1 to 3 (arXiv:1504.08083);
    Shrivastava et al. 2016, "Training Region-based Object Detectors with Online
    Hard Example Mining", section 4 (arXiv:1604.03540), here without suppressing
    overlapping RoIs, as Dai et al. 2016, section 2 (arXiv:1605.06409).
    """
    counted, label = targets.labels >= 0, jnp.maximum(targets.labels, 0)
    logits = logits.astype(jnp.float32)
    classes = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    predicted = _deltas_of_label(deltas.astype(jnp.float32), label, logits.shape[-1])
    boxes = smooth_l1(predicted - targets.deltas, SMOOTH_L1_CORNER).sum(axis=-1) * (label > 0)
    if num_hardest is not None:
        counted = jax.vmap(hardest, (0, None, 0))(classes + boxes, num_hardest, counted)
    total = jnp.maximum(counted.sum(), 1)
    return {
        "roi_classes": jnp.where(counted, classes, 0).sum() / total,
        "roi_boxes": jnp.where(counted, boxes, 0).sum() / total,
    }


def roi_detections(
    proposals: Proposals,
    logits: Float[Array, "B R K"],
    deltas: Float[Array, "B R D 4"],
    sizes: Float[Array, "B 2"],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> Detections:
    """Turns what a head says of the proposals into detections.

    Args:
      proposals: that the head saw.
      logits: of the background and the classes.
      deltas: D is 1, or the number of logits.
      sizes: rows and columns of each image, to which boxes are cut.
      score_threshold: detections score higher.
      iou_threshold: overlapping more, the lower-scoring of a class goes.
      max_detections: places for detections in an image.

    Returns:
      The detections of all classes, best first.

    Raises:
      ValueError: D is something else.
    """
    return best_detections(
        *roi_boxes(proposals, logits, deltas, sizes),
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )


def roi_boxes(
    proposals: Proposals,
    logits: Float[Array, "B R K"],
    deltas: Float[Array, "B R D 4"],
    sizes: Float[Array, "B 2"],
) -> tuple[Float[Array, "B R S 4"], Float[Array, "B R L"]]:
    """The boxes and scores that a head gives the proposals.

    Args: as of `roi_detections`.

    Returns:
      Boxes, S = 1 for all classes or one for each of the L = K - 1, and the
      probabilities of the classes, 0 for filling and boxes with hardly an area.

    Raises:
      ValueError: D is neither 1 nor the number of logits.
    """
    _check_deltas("roi_boxes", deltas, logits.shape[-1])
    if deltas.shape[2] > 1:
        deltas = deltas[:, :, 1:]
    rois = proposals.boxes[:, :, None, :]
    boxes = decode_deltas(deltas.astype(jnp.float32), rois, weights=ROI_WEIGHTS)
    boxes = jax.vmap(clip_boxes)(boxes, sizes)
    good = (boxes[..., 2:] - boxes[..., :2] >= _MIN_SIDE).all(axis=-1)
    scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[..., 1:]
    return boxes, jnp.where(good & proposals.valid[..., None], scores, 0)


def best_detections(
    boxes: Float[Array, "B R S 4"],
    scores: Float[Array, "B R L"],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> Detections:
    """`select_detections` for what `roi_boxes` returns; arguments as of `roi_detections`."""

    def one(boxes, scores):
        return select_detections(
            boxes if boxes.shape[1] > 1 else boxes[:, 0],
            scores,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )

    return jax.vmap(one)(boxes, scores)


def _deltas_of_label(deltas, label, num_logits) -> Float[Array, "B R 4"]:
    """The set of deltas that belongs to the label of each RoI."""
    _check_deltas("roi_losses", deltas, num_logits)
    if deltas.shape[2] == 1:
        return deltas[:, :, 0]
    return jnp.take_along_axis(deltas, label[:, :, None, None], axis=2)[:, :, 0]


def _check_deltas(function: str, deltas: jax.Array, num_logits: int) -> None:
    if deltas.shape[2] not in (1, num_logits):
        raise ValueError(
            f"{function}: deltas {deltas.shape} (B, R, D, 4) must have D = 1, shared by all "
            f"classes, or D = {num_logits}, one set for each logit"
        )
