"""YOLO v2: anchors on one map of a fully convolutional network.

Paper    Redmon and Farhadi 2017, "YOLO9000: Better, Faster, Stronger"
         (arXiv:1612.08242), section 2 (all of "Better" but the hierarchy of words) and
         "Training for detection" of section 3. Anchors of another data set come from
         `ops.shape_clusters.cluster_shapes`, training at several sizes from
         `image_pyramid.multi_scale_loss`: a size for each step, not for ten.
Differs  The paper gives no loss; this is that of Darknet's region layer with the
         constants of yolov2-voc.cfg, without what draws all boxes to their anchors
         during its first 12,800 images. As in that file, and not in the paper, a
         convolution narrows the map that is passed through. The passing orders channels
         as `pixel_unshuffle`, Darknet's "reorg" in a way of its own. The last
         convolution starts near zero. Of two objects at one place the first listed is
         learnt, see `yolo_places`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.models.detection.detector import Batch, Detector, objects
from jaxmodels.models.detection.points import Predictor
from jaxmodels.models.detection.yolo_places import (
    AnchorPlaces,
    Shape,
    background,
    best_in_image,
    first_at,
    require_levels,
)
from jaxmodels.models.vision.darknet import DarkConv, darknet19
from jaxmodels.ops.box_overlaps import iou
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.pixel_shuffle import pixel_unshuffle
from jaxmodels.registry import register_model

# Of Pascal VOC (yolov2-voc.cfg), there in cells of 32 pixels, for images of 416.
VOC_ANCHORS = (
    (42.3072, 55.4064),
    (102.168, 128.30208),
    (161.78784, 259.16544),
    (303.07584, 154.89696),
    (359.5648, 320.2240),
)


def region_losses(
    raw: Float[Array, "P F"],
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    valid: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    *,
    places: AnchorPlaces,
    ignore_threshold: float = 0.6,
    object_weight: float = 5.0,
) -> dict[str, Float[Array, ""]]:
    """The loss of one image: Darknet's region layer.

    box        1/2 sum over objects of (2 - w h) |(sigmoid(t_xy), t_wh) - target|^2
    object     5/2 sum over objects of (IoU - sigmoid(t_o))^2
    no_object  1/2 sum over the background of sigmoid(t_o)^2
    class      - sum over objects of log softmax(t_class)_label

    w h is the share of the image that the object covers, IoU the overlap of the
    predicted box with it, a constant. The halves are those of Darknet's gradients.

    Args:
      raw: (t_x, t_y, t_w, t_h, t_o, logits of classes) at every place.
      boxes, labels: of the image.
      valid, ignored: which of them are objects, and which to be ignored.
      places: of the image.
      ignore_threshold: predictions that overlap an object by more are no background.
      object_weight: the 5.

    Source: Redmon and Farhadi 2017, section 2 (arXiv:1612.08242); Darknet's
    region_layer.c.
    """
    where = places.of(boxes)
    first = first_at(where, valid)
    found = jax.lax.stop_gradient(places.decode(raw[:, :4]))
    own, target = raw[where], places.encode(boxes, where)
    error = jnp.concatenate([nn.sigmoid(own[:, :2]), own[:, 2:4]], axis=1) - target
    free = background(found, where, first, boxes, valid, ignored, ignore_threshold)
    confidence = nn.sigmoid(raw[:, 4])
    classes = optax.softmax_cross_entropy_with_integer_labels(own[:, 5:], jnp.maximum(labels, 0))
    terms = {
        "box": places.size_weights(boxes) * jnp.square(error).sum(axis=1) / 2,
        "object": object_weight * jnp.square(iou(found[where], boxes) - confidence[where]) / 2,
        "class": classes,
    }
    terms = {name: jnp.where(first, term, 0).sum() for name, term in terms.items()}
    return {**terms, "no_object": (free * jnp.square(confidence)).sum() / 2}


class YoloV2(Detector):
    """Three convolutions on the last map of a backbone, joined by a finer one.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: logits of each box.
      anchors: widths and heights in pixels.
      level: the backbone's map that boxes are predicted on.
      passthrough: the finer one that is laid out to its size, or None.
      width: channels of the convolutions.
      passthrough_width: to which the finer map is narrowed first.
      norm: of the convolutions, "batch" or "frozen".
      score_threshold, iou_threshold, max_detections: see `ops.select_detections`.
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 20
    anchors: tuple[Shape, ...] = VOC_ANCHORS
    level: str = "C5"
    passthrough: str | None = "C4"
    width: int = 1024
    passthrough_width: int = 64
    norm: str = "batch"
    score_threshold: float = 0.005
    iou_threshold: float = 0.45
    max_detections: int = 100
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B V U F"]:
        """What the network says of every cell.

        Args:
          images: with sides that are multiples of the map's stride.
          train: normalises by the batch; updates the collection "batch_stats".

        Returns:
          F = A (5 + num_classes): for each anchor t_x, t_y, t_w, t_h, t_o, logits.

        Raises:
          ValueError: the backbone has no such maps, or does not take the images.
        """
        levels = [level for level in (self.level, self.passthrough) if level]
        strides = require_levels("YoloV2", self.backbone, tuple(levels), images)
        maps = self.backbone.features(images, train=train)
        unit = partial(DarkConv, norm=self.norm, dtype=self.dtype)
        x = maps[self.level].astype(self.dtype)
        for name in ("conv_1", "conv_2"):
            x = unit(self.width, 3, name=name)(x, train=train)
        if self.passthrough:
            fine = unit(self.passthrough_width, 1, name="passthrough")
            passed = fine(maps[self.passthrough].astype(self.dtype), train=train)
            passed = pixel_unshuffle(passed, strides[0] // strides[1])
            x = jnp.concatenate([passed, x], axis=-1)
        x = unit(self.width, 3, name="conv_3")(x, train=train)
        outputs = len(self.anchors) * (5 + self.num_classes)
        return Predictor(outputs, dtype=self.dtype, name="predict")(x)

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """See `region_losses`, here means over the images."""
        raw, places = self._raw(batch["image"], train=True)
        of_image = partial(region_losses, places=places)
        terms = jax.vmap(of_image)(raw, batch["boxes"], batch["box_labels"], *objects(batch))
        return {name: term.mean() for name, term in terms.items()}

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """The boxes of all places with score sigmoid(t_o) softmax(logits), and suppression."""
        raw, places = self._raw(images, train=False)

        def of_image(raw, size):
            scores = nn.sigmoid(raw[:, 4:5]) * nn.softmax(raw[:, 5:])
            return best_in_image(self, places.decode(raw[:, :4]), scores, size)

        return jax.vmap(of_image)(raw, image_sizes)

    def _raw(self, images: Array, *, train: bool) -> tuple[Float[Array, "B P F"], AnchorPlaces]:
        """The predictions of all places, and these."""
        raw = self(images, train=train)
        stride = self.backbone.feature_strides[self.level]
        places = AnchorPlaces((raw.shape[1:3],), (stride,), (self.anchors,))
        return raw.reshape(len(raw), -1, 5 + self.num_classes), places


@register_model
def yolo_v2(**overrides) -> YoloV2:
    """YOLO v2 on Darknet-19 for the 20 classes of Pascal VOC."""
    return YoloV2(**{"backbone": darknet19(num_classes=0), **overrides})
