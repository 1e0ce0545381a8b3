"""How much boxes overlap: intersection over union, and its forms that also pull apart boxes.

A box of negative width or height has no area. A quotient of 0 / 0, as of empty boxes, is
zero with zero gradient.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmodels.ops.boxes import box_area

# Square pixels: smaller areas count as none, so that no gradient is infinite.
_EMPTY = 1e-9


def pairwise_iou(boxes: Float[Array, "N 4"], others: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Intersection over union of every one of `boxes` with every one of `others`.

    out[n, m] = |boxes_n and others_m| / |boxes_n or others_m|

    O(N M) time and memory.

    Source: Everingham et al. 2010, "The Pascal Visual Object Classes (VOC)
    Challenge", section 4.2, equation 3.
    """
    return iou(boxes[:, None], others[None, :])


def pairwise_intersection_over_area(
    boxes: Float[Array, "N 4"], others: Float[Array, "M 4"]
) -> Float[Array, "N M"]:
    """The share of each of `boxes` that lies inside each of `others`.

    out[n, m] = |boxes_n and others_m| / |boxes_n|

    It takes the place of the intersection over union where `others` are regions full
    of objects ("crowds"), in which a box should neither be learnt nor count as wrong.

    Source: the COCO evaluation's rule for `iscrowd`, Lin et al. 2014
    (arXiv:1405.0312).
    """
    shared = _intersection(boxes[:, None], others[None, :])
    return _quotient(shared, jnp.broadcast_to(box_area(boxes)[:, None], shared.shape))


def iou(boxes: Float[Array, "*#B 4"], others: Float[Array, "*#B 4"]) -> Float[Array, "*#B"]:
    """Intersection over union, |a and b| / |a or b|, of one box with one other."""
    shared = _intersection(boxes, others)
    return _quotient(shared, _union(boxes, others, shared))


def column_iou(
    box: Float[Array, "4"],
    x1: Float[Array, "N"],
    y1: Float[Array, "N"],
    x2: Float[Array, "N"],
    y2: Float[Array, "N"],
    areas: Float[Array, "N"],
) -> Float[Array, "N"]:
    """`iou` of one box with many whose coordinates lie apart, in half the instructions.

    Bit for bit that of `iou` where it is above zero; at most zero elsewhere, also where
    a coordinate is NaN. For loops that compare it with a threshold; it has no useful gradient.
    """
    # Comparisons: maxima that must pass on NaN take CPUs three instructions, these one.
    right, bottom = jnp.where(box[2] < x2, box[2], x2), jnp.where(box[3] < y2, box[3], y2)
    left, top = jnp.where(box[0] > x1, box[0], x1), jnp.where(box[1] > y1, box[1], y1)
    width = right - left
    # Of two negative lengths one may stay so, as their product is not above zero then.
    shared = jnp.where(width > 0, width, 0) * (bottom - top)
    union = box_area(box) + areas - shared
    return jnp.where(union > _EMPTY, shared / union, 0)


def generalized_iou(
    boxes: Float[Array, "*#B 4"], others: Float[Array, "*#B 4"]
) -> Float[Array, "*#B"]:
    """IoU less the share that is empty of the box around both; in [-1, 1].

    out = |a and b| / |a or b| - (|c| - |a or b|) / |c|,  c the smallest box around a, b

    Source: Rezatofighi et al. 2019, "Generalized Intersection over Union",
    algorithm 2 (arXiv:1902.09630).
    """
    shared = _intersection(boxes, others)
    union, around = _union(boxes, others, shared), box_area(_around(boxes, others))
    return _quotient(shared, union) - _quotient(around - union, around)


def distance_iou(
    boxes: Float[Array, "*#B 4"], others: Float[Array, "*#B 4"]
) -> Float[Array, "*#B"]:
    """IoU less the squared distance of the centres, in diagonals of the box around both.

    out = IoU - |centre_a - centre_b|^2 / diagonal_c^2,  c the smallest box around a, b

    Source: Zheng et al. 2020, "Distance-IoU Loss", equations 6 and 7
    (arXiv:1911.08287).
    """
    apart = (boxes[..., :2] + boxes[..., 2:] - others[..., :2] - others[..., 2:]) / 2
    around = _around(boxes, others)
    diagonal = around[..., 2:] - around[..., :2]
    return iou(boxes, others) - _quotient(jnp.sum(apart**2, -1), jnp.sum(diagonal**2, -1))


def complete_iou(
    boxes: Float[Array, "*#B 4"], others: Float[Array, "*#B 4"]
) -> Float[Array, "*#B"]:
    """Distance-IoU less a measure of how the shapes differ.

    out = DIoU - alpha v,  v = 4 / pi^2 (atan(w_a / h_a) - atan(w_b / h_b))^2,
    alpha = v / (1 - IoU + v)

    alpha is a constant for the gradient. That of v is the exact one; the paper's
    code leaves out its factor 1 / (w^2 + h^2).

    Source: Zheng et al. 2020, "Distance-IoU Loss", equations 8 to 12
    (arXiv:1911.08287).
    """
    v = 4 / math.pi**2 * (_slant(boxes) - _slant(others)) ** 2
    alpha = _quotient(v, 1 - iou(boxes, others) + v)
    return distance_iou(boxes, others) - lax.stop_gradient(alpha) * v


def _intersection(boxes: Array, others: Array) -> Array:
    # Coordinates one by one: a last axis of two would fill a vector register badly.
    width, height = (
        jnp.minimum(boxes[..., i + 2], others[..., i + 2])
        - jnp.maximum(boxes[..., i], others[..., i])
        for i in (0, 1)
    )
    return jnp.maximum(width, 0) * jnp.maximum(height, 0)


def _union(boxes: Array, others: Array, shared: Array) -> Array:
    return box_area(boxes) + box_area(others) - shared


def _around(boxes: Array, others: Array) -> Array:
    low = jnp.minimum(boxes[..., :2], others[..., :2])
    return jnp.concatenate([low, jnp.maximum(boxes[..., 2:], others[..., 2:])], axis=-1)


def _slant(boxes: Array) -> Array:
    """The angle of the diagonal, atan(width / height)."""
    size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], math.sqrt(_EMPTY))
    return jnp.arctan2(size[..., 0], size[..., 1])


def _quotient(part: Array, whole: Array) -> Array:
    """part / whole, and zero with zero gradient where whole is empty."""
    full = whole > _EMPTY
    return jnp.where(full, part / jnp.where(full, whole, 1), 0)
