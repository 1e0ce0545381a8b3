"""Losses of detectors, elementwise; what to sum and what to divide by is each paper's own.

The focal loss is `optax.sigmoid_focal_loss`.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmodels.ops import box_overlaps
from jaxmodels.ops.checks import require_within

_OVERLAPS = {
    "iou": box_overlaps.iou,
    "giou": box_overlaps.generalized_iou,
    "diou": box_overlaps.distance_iou,
    "ciou": box_overlaps.complete_iou,
}
# The overlap of boxes that do not, whose logarithm is to be finite.
_APART = 1e-6


def heat_map_focal_loss(logits: Float[Array, "*B"], heat: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Cross entropy that forgives easy cells and cells near an object.

    -(1 - p)^2 log p               where heat = 1
    -(1 - heat)^4 p^2 log(1 - p)   elsewhere,  p = sigmoid(logits)

    Args:
      logits: of the heat map that the network predicts.
      heat: the true one, exactly 1 at objects; see `splat_gaussians`.

    Returns:
      The loss of every cell; the papers divide its sum by the number of objects.

    Raises:
      ValueError: the true heat leaves [0, 1].

    Source: Law and Deng 2018, "CornerNet", equation 1, alpha = 2 and beta = 4
    (arXiv:1808.01244).
    """
    require_within("heat_map_focal_loss", "heat", heat, 0, 1)
    p, rest = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    of_object = rest**2 * jax.nn.log_sigmoid(logits)
    of_others = (1 - heat) ** 4 * p**2 * jax.nn.log_sigmoid(-logits)
    return -jnp.where(heat == 1, of_object, of_others)


def iou_loss(
    boxes: Float[Array, "*B 4"], targets: Float[Array, "*B 4"], kind: str = "giou"
) -> Float[Array, "*B"]:
    """1 - overlap, or -log IoU, of predicted boxes with true ones.

    Args:
      boxes, targets: xyxy.
      kind: "iou", "giou", "diou" or "ciou" for 1 - that overlap (see
        `ops.box_overlaps`), or "log_iou" for -log(max(IoU, 1e-6)). Boxes that do not
        overlap learn nothing from "iou" and "log_iou".

    Raises:
      ValueError: an unknown kind.

    Source: Yu et al. 2016, "UnitBox", section 3.2 (arXiv:1608.01471), for the
    logarithm; for the others the sources of the overlaps.
    """
    if kind == "log_iou":
        return -jnp.log(jnp.maximum(box_overlaps.iou(boxes, targets), _APART))
    if kind not in _OVERLAPS:
        known = ("log_iou", *_OVERLAPS)
        raise ValueError(f"iou_loss: unknown kind {kind!r}; pass one of {known}")
    return 1 - _OVERLAPS[kind](boxes, targets)


def smooth_l1(errors: Float[Array, "*B"], beta: float = 1.0) -> Float[Array, "*B"]:
    """errors^2 / (2 beta) where |errors| < beta, and |errors| - beta / 2 elsewhere.

    It is `optax.huber_loss` over its delta: its slope is 1 at most, whatever beta.

    Raises:
      ValueError: beta is not positive.

    Source: Girshick 2015, "Fast R-CNN", equation 3 (arXiv:1504.08083), where beta is 1.
    """
    if beta <= 0:
        raise ValueError(f"smooth_l1: beta={beta} must be positive; for 0 take the absolute value")
    return optax.huber_loss(errors, delta=beta) / beta
