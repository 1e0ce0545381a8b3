"""What the three YOLOs share: which prediction an object is given to, and which to none.

A network says a fixed number of boxes, each at a place. An object belongs to one
place, and where several ask for the same one, the first listed in the batch gets it;
the others are not taught, but no prediction that is near them is taught to be
background. Redmon's Darknet lets the first win in v1, the last in v2 and v3.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.models.detection.detector import Detector
from jaxmodels.models.vision.checks import require_images
from jaxmodels.ops.box_coding import decode_cells, encode_cells
from jaxmodels.ops.box_overlaps import pairwise_intersection_over_area, pairwise_iou
from jaxmodels.ops.boxes import box_area, clip_boxes
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.select_detections import select_detections
from jaxmodels.ops.shape_clusters import shape_iou

Shape = tuple[float | int, float | int]
# A prediction that lies by more than this in an ignored box is not taught to be background.
_IGNORED_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class AnchorPlaces:
    """The places of an image: level by level, row by row, column by column, anchor by anchor.

    Attributes:
      grids: rows and columns of each level's map.
      strides: pixels a cell.
      anchors: widths and heights in pixels, for each level.
    """

    grids: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    anchors: tuple[tuple[Shape, ...], ...]

    def of(self, boxes: Float[Array, "N 4"]) -> Int[Array, "N"]:
        """The place of every box: the anchor that its shape overlaps most, where its centre is.

        Of all anchors of all levels; the first of equal ones. A centre outside the
        image is moved into its nearest cell.
        """
        counts = np.array([len(level) for level in self.anchors])
        sizes = np.prod(self.grids, axis=1) * counts
        starts = np.cumsum(sizes) - sizes
        # What every anchor has from its level, and its own place in the first cell.
        first = np.concatenate([s + np.arange(n) for s, n in zip(starts, counts, strict=True)])
        columns, rows = np.repeat(self.grids, counts, axis=0).T[::-1]
        strides, step = np.repeat(self.strides, counts), np.repeat(counts, counts)
        shapes = jnp.asarray(np.concatenate(self.anchors), jnp.float32)
        best = shape_iou(boxes[:, 2:] - boxes[:, :2], shapes).argmax(axis=1)

        def cell(axis, count):
            centre = (boxes[:, axis] + boxes[:, axis + 2]) / 2 / jnp.asarray(strides)[best]
            return jnp.clip(jnp.floor(centre).astype(jnp.int32), 0, jnp.asarray(count)[best] - 1)

        cells = cell(1, rows) * jnp.asarray(columns)[best] + cell(0, columns)
        return jnp.asarray(first)[best] + cells * jnp.asarray(step)[best]

    def encode(self, boxes: Float[Array, "N 4"], places: Int[Array, "N"]) -> Float[Array, "N 4"]:
        """Targets of boxes at their places, see `ops.box_coding.encode_cells`."""
        cells, shapes, strides = (table[places] for table in self._tables())
        return encode_cells(boxes / strides, cells, shapes / strides, 1)

    def decode(self, raw: Float[Array, "P 4"]) -> Float[Array, "P 4"]:
        """Boxes of all places from what the network says, see `ops.box_coding.decode_cells`."""
        cells, shapes, strides = self._tables()
        return strides * decode_cells(raw, cells, shapes / strides, 1)

    def size_weights(self, boxes: Float[Array, "N 4"]) -> Float[Array, "N"]:
        """2 less the share of the image that a box covers: small ones count up to twice."""
        (rows, columns), stride = self.grids[0], self.strides[0]
        return 2 - box_area(boxes) / (rows * columns * stride**2)

    def _tables(self) -> tuple[Int[Array, "P 2"], Float[Array, "P 2"], Float[Array, "P 1"]]:
        """(column, row), anchor and stride of every place."""
        levels = []
        for (rows, columns), stride, anchors in zip(
            self.grids, self.strides, self.anchors, strict=True
        ):
            cells = np.repeat(grid_cells((rows, columns)), len(anchors), axis=0)
            shapes = np.tile(np.asarray(anchors, np.float32), (rows * columns, 1))
            levels.append((cells, shapes, np.full((len(cells), 1), stride, np.float32)))
        cells, shapes, strides = (
            jnp.asarray(np.concatenate(parts)) for parts in zip(*levels, strict=True)
        )
        return cells, shapes, strides


def grid_cells(grid: tuple[int, int]) -> Int[np.ndarray, "P 2"]:
    """(column, row) of all cells of a grid, row by row."""
    rows, columns = np.indices(grid, np.int32).reshape(2, -1)
    return np.stack([columns, rows], axis=1)


def first_at(places: Int[Array, "N"], valid: Bool[Array, "N"]) -> Bool[Array, "N"]:
    """Which valid objects get their place: of those that ask for the same, the first listed."""
    same = (places[:, None] == places[None, :]) & valid[None, :]
    earlier = jnp.tril(jnp.ones_like(same), -1)
    return valid & ~(same & earlier).any(axis=1)


def background(
    predicted: Float[Array, "P 4"],
    taken: Int[Array, "N"],
    first: Bool[Array, "N"],
    boxes: Float[Array, "N 4"],
    valid: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    threshold: float,
) -> Float[Array, "P"]:
    """1 for the predictions that are taught that there is no object, 0 for the others.

    Those are neither at the place of an object, nor overlap one by more than the
    threshold, nor lie by more than half in an ignored box.

    Args:
      predicted: boxes.
      taken: places of the objects.
      first: which objects got them.
      boxes: of the image, of which `valid` are objects and `ignored` to be ignored.
      threshold: of the intersection over union; infinity is none.
    """
    near = ((pairwise_iou(predicted, boxes) > threshold) & valid[None, :]).any(axis=1)
    shares = pairwise_intersection_over_area(predicted, boxes)
    inside = ((shares > _IGNORED_SHARE) & ignored[None, :]).any(axis=1)
    out_of_range = len(predicted)
    free = jnp.ones(len(predicted), bool)
    free = free.at[jnp.where(first, taken, out_of_range)].set(False, mode="drop")
    return (free & ~near & ~inside).astype(predicted.dtype)


def best_in_image(
    model: Detector,
    boxes: Float[Array, "P 4"],
    scores: Float[Array, "P K"],
    size: Float[Array, "2"],
) -> Detections:
    """What is left of the predictions of one image after cutting and suppression.

    Args:
      model: its fields `score_threshold`, `iou_threshold` and `max_detections` are those
        of `ops.select_detections`.
      boxes, scores: of all places; boxes without a part inside the image are left out.
      size: rows and columns of the image without its padding.
    """
    boxes = clip_boxes(boxes, size)
    return select_detections(
        boxes,
        jnp.where(box_area(boxes)[:, None] > 0, scores, 0),
        score_threshold=model.score_threshold,
        iou_threshold=model.iou_threshold,
        max_detections=model.max_detections,
    )


def require_levels(
    model: str, backbone: nn.Module, levels: tuple[str, ...], images: Array
) -> list[int]:
    """The strides of the maps that a detector reads.

    Args:
      model: its name, for the message.
      backbone: any module with `feature_strides`.
      levels: names of the maps.
      images: whose sides must be multiples of the largest stride.

    Raises:
      ValueError: the backbone has no such map, or the images have no such sides or
        are not what the backbone takes.
    """
    known = backbone.feature_strides
    if missing := [level for level in levels if level not in known]:
        raise ValueError(f"{model}: the backbone has no map {missing[0]!r}; it has {known}")
    strides = [known[level] for level in levels]
    # Before the sides, or channels that come first would be taken for rows.
    require_images(model, images, getattr(backbone, "in_channels", images.shape[-1]), 1)
    require_multiple(model, images, max(strides))
    return strides


def require_multiple(model: str, images: Array, stride: int) -> None:
    """Raises ValueError unless the sides of images are multiples of a stride."""
    if images.shape[1] % stride or images.shape[2] % stride:
        raise ValueError(
            f"{model}: images of {images.shape[1]} x {images.shape[2]} pixels have sides that are "
            f"not multiples of the stride {stride}; resize them, or pad them below and on the right"
        )
