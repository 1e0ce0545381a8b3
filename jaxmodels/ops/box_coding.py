"""What networks predict in the place of coordinates: offsets from anchors, points and cells."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.boxes import cxcywh_to_xyxy, require_boxes, xyxy_to_cxcywh

# No box grows beyond this multiple of its anchor, so that no size overflows.
_MAX_LOG_RATIO = math.log(1000 / 16)
# Pixels: the sizes of narrower boxes have the logarithm or root of this one, which is finite.
_NARROW = 1e-3

_Weights = tuple[float, float, float, float] | tuple[int, int, int, int]


def encode_deltas(
    boxes: Float[Array, "*#B 4"],
    anchors: Float[Array, "*#B 4"],
    *,
    weights: _Weights = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "*#B 4"]:
    """Boxes as differences from anchors: R-CNN's regression targets.

    t_x = weights_0 (x - x_a) / w_a,  t_w = weights_2 log(w / w_a),
    and y, h likewise, of centres (x, y) and sizes (w, h)

    Args:
      boxes: what is to be found.
      anchors: boxes that it is found from.
      weights: factors of the four differences, which make their variances alike;
        (10, 10, 5, 5) in the second stage of Faster R-CNN.

    Returns:
      (t_x, t_y, t_w, t_h).

    Raises:
      ValueError: a box or an anchor has a negative size or is not finite.

    Source: Girshick et al. 2014, "Rich Feature Hierarchies", appendix C, equations 6
    to 9 (arXiv:1311.2524).
    """
    require_boxes("encode_deltas", "boxes", boxes)
    require_boxes("encode_deltas", "anchors", anchors)
    (centre, size), (anchor_centre, anchor_size) = _halves(boxes), _halves(anchors)
    anchor_size = jnp.maximum(anchor_size, _NARROW)
    moves = (centre - anchor_centre) / anchor_size
    scales = jnp.log(jnp.maximum(size, _NARROW) / anchor_size)
    return _weighted(jnp.concatenate([moves, scales], axis=-1), weights)


def decode_deltas(
    deltas: Float[Array, "*#B 4"],
    anchors: Float[Array, "*#B 4"],
    *,
    weights: _Weights = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float = _MAX_LOG_RATIO,
) -> Float[Array, "*#B 4"]:
    """Boxes from their differences from anchors; undoes `encode_deltas`.

    x = x_a + w_a t_x / weights_0,  w = w_a exp(min(t_w / weights_2, max_log_ratio))

    Args:
      deltas: (t_x, t_y, t_w, t_h).
      anchors: boxes that they are relative to.
      weights: as they were for `encode_deltas`.
      max_log_ratio: largest logarithm of a size over its anchor's.

    Source: Girshick et al. 2014, appendix C, equations 1 to 4 (arXiv:1311.2524); the
    bound on the ratio is Detectron's and torchvision's.
    """
    deltas = _weighted(deltas, tuple(1 / weight for weight in weights))
    anchor_centre, anchor_size = _halves(anchors)
    centre = anchor_centre + anchor_size * deltas[..., :2]
    size = anchor_size * jnp.exp(jnp.minimum(deltas[..., 2:], max_log_ratio))
    return cxcywh_to_xyxy(jnp.concatenate([centre, size], axis=-1))


def encode_distances(
    points: Float[Array, "*#B 2"], boxes: Float[Array, "*#B 4"]
) -> Float[Array, "*#B 4"]:
    """Distances from a point to the left, top, right and bottom of a box, in pixels.

    Negative where the point is outside.

    Args:
      points: (x, y).
      boxes: xyxy.

    Raises:
      ValueError: a box has a negative size or is not finite.

    Source: Tian et al. 2019, "FCOS", equation 1 (arXiv:1904.01355).
    """
    require_boxes("encode_distances", "boxes", boxes)
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def decode_distances(
    points: Float[Array, "*#B 2"], distances: Float[Array, "*#B 4"]
) -> Float[Array, "*#B 4"]:
    """Boxes from the distances of their sides from a point; undoes `encode_distances`."""
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def encode_cells(
    boxes: Float[Array, "*#B 4"],
    cells: Int[Array, "*#B 2"],
    shapes: Float[Array, "*#B 2"],
    stride: float | int,
) -> Float[Array, "*#B 4"]:
    """Boxes as places in a cell and sizes relative to an anchor: YOLO's targets.

    (x / stride - column, y / stride - row, log(w / w_a), log(h / h_a))

    The first two are in [0, 1] for a cell that holds the centre (x, y): they are
    targets of the sigmoid of what the network says, as in the authors' code.

    Args:
      boxes: what is to be found.
      cells: (column, row) of the cell that is to find it.
      shapes: (width, height) of the anchor in pixels.
      stride: side of a cell in pixels.

    Raises:
      ValueError: a box has a negative size or is not finite.

    Source: Redmon and Farhadi 2016, "YOLO9000", section 2, "Direct location
    prediction" (arXiv:1612.08242).
    """
    require_boxes("encode_cells", "boxes", boxes)
    centre, size = _halves(boxes)
    scales = jnp.log(jnp.maximum(size, _NARROW) / shapes)
    return jnp.concatenate([centre / stride - cells, scales], axis=-1)


def decode_cells(
    raw: Float[Array, "*#B 4"],
    cells: Int[Array, "*#B 2"],
    shapes: Float[Array, "*#B 2"],
    stride: float | int,
) -> Float[Array, "*#B 4"]:
    """Boxes from what YOLO v2 and v3 say of a cell and an anchor.

    x = stride (column + sigmoid(t_x)),  w = w_a exp(min(t_w, log(1000 / 16)))

    Args:
      raw: (t_x, t_y, t_w, t_h), unbounded.
      cells, shapes, stride: as of `encode_cells`.

    Source: Redmon and Farhadi 2016, section 2, "Direct location prediction"
    (arXiv:1612.08242). The bound on the exponent is not in the paper.
    """
    centre = stride * (cells + jax.nn.sigmoid(raw[..., :2]))
    size = shapes * jnp.exp(jnp.minimum(raw[..., 2:], _MAX_LOG_RATIO))
    return cxcywh_to_xyxy(jnp.concatenate([centre, size], axis=-1))


def encode_grid_boxes(
    boxes: Float[Array, "*#B 4"],
    cells: Int[Array, "*#B 2"],
    grid: tuple[int, int],
    size: tuple[int, int],
) -> Float[Array, "*#B 4"]:
    """Boxes as places in a cell and roots of their share of the image: YOLO v1's targets.

    (columns x / X - column, rows y / Y - row, sqrt(w / X), sqrt(h / Y))

    Args:
      boxes: what is to be found.
      cells: (column, row) of the cell that is to find it.
      grid: rows and columns of cells.
      size: Y and X of the image in pixels.

    Raises:
      ValueError: a box leaves the image, has a negative size or is not finite.

    Source: Redmon et al. 2015, "You Only Look Once", sections 2 and 2.2
    (arXiv:1506.02640).
    """
    require_boxes("encode_grid_boxes", "boxes", boxes, size)
    per_cell, image = _grid_scales(boxes, grid, size)
    centre, extent = _halves(boxes)
    roots = jnp.sqrt(jnp.maximum(extent, _NARROW) / image)
    return jnp.concatenate([centre / per_cell - cells, roots], axis=-1)


def decode_grid_boxes(
    raw: Float[Array, "*#B 4"],
    cells: Int[Array, "*#B 2"],
    grid: tuple[int, int],
    size: tuple[int, int],
) -> Float[Array, "*#B 4"]:
    """Boxes from what YOLO v1 says of a cell; undoes `encode_grid_boxes`.

    x = (column + t_x) X / columns,  w = t_w^2 X

    Args:
      raw: (t_x, t_y, t_w, t_h).
      cells, grid, size: as of `encode_grid_boxes`.

    Source: Redmon et al. 2015, sections 2 and 2.2 (arXiv:1506.02640).
    """
    per_cell, image = _grid_scales(raw, grid, size)
    centre, extent = (cells + raw[..., :2]) * per_cell, raw[..., 2:] ** 2 * image
    return cxcywh_to_xyxy(jnp.concatenate([centre, extent], axis=-1))


def _halves(boxes: Array) -> tuple[Array, Array]:
    """Centres and sizes."""
    boxes_cxcywh = xyxy_to_cxcywh(boxes)
    return boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]


def _weighted(deltas: Array, weights: _Weights) -> Array:
    return deltas * jnp.array(weights, deltas.dtype).reshape((1,) * (deltas.ndim - 1) + (4,))


def _grid_scales(like: Array, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Array, Array]:
    """(width, height) of a cell and of the image, shaped to meet `like`."""
    shape = (1,) * (like.ndim - 1) + (2,)
    image = jnp.array(size[::-1], like.dtype).reshape(shape)
    return image / jnp.array(grid[::-1], like.dtype).reshape(shape), image
