"""YOLO v1: every cell of a grid says a few boxes and one class.

Paper    Redmon et al. 2016, "You Only Look Once: Unified, Real-Time Object Detection"
         (arXiv:1506.02640): the network of figure 3 and the loss of section 2.2,
         equation 3.
Differs  The network says the square root of a size, as in Darknet's code: the loss is
         then what equation 3 says of sizes, and finite for any prediction. Where no
         box of a cell overlaps its object, the nearest is responsible, also as
         there. Of several objects with their centres in one cell the first listed
         is learnt, see `yolo_places`. `image_size=None` drops the two dense layers
         for a 1 x 1 convolution, which takes any image. Scores are cut to [0, 1],
         which nothing else holds them in.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.layers.linear import Linear
from jaxmodels.models.detection.detector import Batch, Detector, objects
from jaxmodels.models.detection.points import Predictor
from jaxmodels.models.detection.yolo_places import (
    background,
    best_in_image,
    first_at,
    grid_cells,
    require_levels,
    require_multiple,
)
from jaxmodels.models.vision.darknet import DarkConv, leaky_relu
from jaxmodels.models.vision.extraction import extraction
from jaxmodels.ops.box_coding import decode_grid_boxes, encode_grid_boxes
from jaxmodels.ops.box_overlaps import iou
from jaxmodels.ops.detections import Detections
from jaxmodels.registry import register_model


def grid_losses(
    raw: Float[Array, "Y X F"],
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    valid: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    *,
    size: tuple[int, int],
    predictors: int,
    box_weight: float = 5.0,
    no_object_weight: float = 0.5,
) -> dict[str, Float[Array, ""]]:
    """The loss of one image: equation 3.

    box        5 sum over objects of (x - x')^2 + (y - y')^2 + (r_w - r_w')^2 + (r_h - r_h')^2
    object     sum over objects of (IoU - c)^2
    no_object  1/2 sum over all other predictors of c^2
    class      sum over objects and classes of (p_k - [k is label])^2

    (x, y) is the centre's place in its cell, (r_w, r_h) are the roots of the size as a
    share of the image's, c the confidence; all but p are those of the responsible
    predictor, whose box overlaps the object most. IoU is that overlap, a constant.

    Args:
      raw: of every cell, x, y, r_w, r_h, c of each predictor, and p of each class.
      boxes, labels: of the image.
      valid, ignored: which of them are objects, and which to be ignored.
      size: rows and columns of the image.
      predictors: of each cell.
      box_weight, no_object_weight: the 5 and the 1/2.

    Source: Redmon et al. 2016, equation 3 (arXiv:1506.02640).
    """
    grid = raw.shape[:2]
    predicted = raw[..., : 5 * predictors].reshape(-1, predictors, 5)
    cells = _cells_of(boxes, grid, size)
    where = cells[:, 1] * grid[1] + cells[:, 0]
    first = first_at(where, valid)
    found = jax.lax.stop_gradient(_decode(raw, size, predictors))
    overlaps = iou(found[where], boxes[:, None])
    target = encode_grid_boxes(boxes, cells, grid, size)
    chosen = _responsible(overlaps, found[where], boxes)
    own = jnp.take_along_axis(predicted[where], chosen[:, None, None], axis=1)[:, 0]
    overlap = jnp.take_along_axis(overlaps, chosen[:, None], axis=1)[:, 0]
    classes = raw[..., 5 * predictors :]
    kinds = jax.nn.one_hot(labels, classes.shape[-1])
    terms = {
        "box": box_weight * jnp.square(own[:, :4] - target).sum(axis=1),
        "object": jnp.square(overlap - own[:, 4]),
        "class": jnp.square(classes.reshape(-1, kinds.shape[1])[where] - kinds).sum(axis=1),
    }
    terms = {name: jnp.where(first, term, 0).sum() for name, term in terms.items()}
    free = background(
        found.reshape(-1, 4), where * predictors + chosen, first, boxes, valid, ignored, math.inf
    )
    others = (free * jnp.square(predicted[..., 4].reshape(-1))).sum()
    return {**terms, "no_object": no_object_weight * others}


def _cells_of(boxes: Array, grid: tuple[int, int], size: tuple[int, int]) -> Int[Array, "N 2"]:
    """(column, row) of the cells that hold the centres of boxes, or are nearest to them."""
    last = jnp.array([[grid[1] - 1, grid[0] - 1]])
    per_cell = jnp.array([[size[1] / grid[1], size[0] / grid[0]]])
    cells = jnp.floor((boxes[:, :2] + boxes[:, 2:]) / 2 / per_cell).astype(jnp.int32)
    return jnp.clip(cells, 0, last)


def _decode(raw: Array, size: tuple[int, int], predictors: int) -> Float[Array, "P B 4"]:
    """The boxes of all predictors of all cells."""
    coded = raw[..., : 5 * predictors].reshape(-1, predictors, 5)[..., :4]
    cells = jnp.asarray(grid_cells(raw.shape[:2]))
    return decode_grid_boxes(coded, cells[:, None], raw.shape[:2], size)


def _responsible(overlaps: Array, found: Array, boxes: Array) -> Int[Array, "N"]:
    """The predictor with the largest overlap, or, where none has any, the nearest corners."""
    distances = jnp.square(found - boxes[:, None]).sum(axis=-1)
    none = (overlaps == 0).all(axis=1)
    return jnp.where(none, distances.argmin(axis=1), overlaps.argmax(axis=1))


class YoloV1(Detector):
    """Four convolutions on the last map of a backbone, and two dense layers.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: scores of each cell.
      image_size: rows and columns of the images that the dense layers are made for;
        None takes a 1 x 1 convolution instead of them.
      level: the backbone's map.
      predictors: boxes of each cell.
      width: channels of the four convolutions.
      stride: of the second of them; the cells of the grid have this and the map's.
      hidden: width of the first dense layer.
      dropout: after it.
      norm: of the convolutions: None for biases, as in the paper, "batch" or "frozen".
      score_threshold, iou_threshold, max_detections: see `ops.select_detections`.
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 20
    image_size: tuple[int, int] | None = (448, 448)
    level: str = "C5"
    predictors: int = 2
    width: int = 1024
    stride: int = 2
    hidden: int = 4096
    dropout: float = 0.5
    norm: str | None = None
    score_threshold: float = 0.001
    iou_threshold: float = 0.5
    max_detections: int = 100
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B V U F"]:
        """What the network says of every cell.

        Args:
          images: of `image_size`, with sides that are multiples of a cell's.
          train: drops hidden units, by the random stream "dropout"; with a norm,
            normalises by the batch and updates "batch_stats".

        Returns:
          F = 5 predictors + num_classes: x, y, r_w, r_h and confidence of each
          predictor, then the classes.

        Raises:
          ValueError: the backbone has no such map, or images are not what the fields say.
        """
        self._check(images)
        x = self.backbone.features(images, train=train)[self.level].astype(self.dtype)
        for i, stride in enumerate((1, self.stride, 1, 1), start=1):
            unit = DarkConv(
                self.width, 3, stride=stride, norm=self.norm, dtype=self.dtype, name=f"conv_{i}"
            )
            x = unit(x, train=train)
        outputs = 5 * self.predictors + self.num_classes
        if self.image_size is None:
            return Predictor(outputs, dtype=self.dtype, name="predict")(x)
        batch, *grid, _ = x.shape
        x = leaky_relu(Linear(self.hidden, dtype=self.dtype, name="dense")(x.reshape(batch, -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = Linear(grid[0] * grid[1] * outputs, dtype=self.dtype, name="predict")(x)
        return x.astype(jnp.float32).reshape(batch, *grid, outputs)

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """See `grid_losses`, here means over the images."""
        images = batch["image"]
        raw = self(images, train=True)
        of_image = partial(grid_losses, size=images.shape[1:3], predictors=self.predictors)
        terms = jax.vmap(of_image)(raw, batch["boxes"], batch["box_labels"], *objects(batch))
        return {name: term.mean() for name, term in terms.items()}

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """The boxes of all predictors with their confidence times the classes, and suppression."""
        raw, count = self(images), 5 * self.predictors

        def of_image(raw, size):
            confidences = raw[..., 4:count:5].reshape(-1, 1)
            classes = jnp.repeat(raw[..., count:], self.predictors, axis=1)
            scores = jnp.clip(confidences, 0, 1) * jnp.clip(classes, 0, 1).reshape(
                -1, self.num_classes
            )
            boxes = _decode(raw, images.shape[1:3], self.predictors).reshape(-1, 4)
            return best_in_image(self, boxes, scores, size)

        return jax.vmap(of_image)(raw, image_sizes)

    def _check(self, images: Array) -> None:
        (stride,) = require_levels("YoloV1", self.backbone, (self.level,), images)
        require_multiple("YoloV1", images, stride * self.stride)
        if self.image_size not in (None, images.shape[1:3]):
            raise ValueError(
                f"YoloV1: images of shape {images.shape} are not of image_size="
                f"{self.image_size}, for which the dense layers are made; resize them, or pass "
                "image_size=None for a model without these"
            )


@register_model
def yolo_v1(**overrides) -> YoloV1:
    """YOLO for the 20 classes of Pascal VOC."""
    return YoloV1(**{"backbone": extraction(num_classes=0), **overrides})
