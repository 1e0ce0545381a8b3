"""YOLO v3: three maps with three anchors each, joined from coarse to fine.

Paper    Redmon and Farhadi 2018, "YOLOv3: An Incremental Improvement"
         (arXiv:1804.02767), section 2; `spp` as in Darknet's yolov3-spp.cfg, a block
         of Huang and Wang 2019 (arXiv:1903.08589).
Differs  Where the paper and Darknet's yolo layer differ, this is Darknet's. The places in
         cells have the loss whose gradient by t_xy is sigmoid(t_xy) - target, binary
         cross-entropy, where the paper compares t_xy with a target that is infinite
         at a cell's border. Errors of small boxes weigh up to twice as much.
         Predictions are ignored when they, and not their anchors, overlap an object
         by more than the threshold; that is the paper's 0.5, which Darknet raised to
         0.7 for some data. The last convolutions start near zero. The two 1 x 1
         convolutions around the pooling have the SiLU of `layers.SPP`. Of two objects
         at one place the first listed is learnt, see `yolo_places`. `box_loss` can
         be that of Rezatofighi et al. 2019 (arXiv:1902.09630) or of Zheng et al. 2020
         (arXiv:1911.08287), who tried theirs on this network.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.layers.pyramid_pooling import SPP
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
from jaxmodels.models.vision.darknet import DarkConv, darknet53
from jaxmodels.ops.detection_losses import iou_loss
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.resize import resize
from jaxmodels.registry import register_model

# Of COCO, for images of 416 pixels (section 2.3).
COCO_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
BOX_LOSSES = ("l2", "iou", "giou", "diou", "ciou")


def yolo_losses(
    raw: Float[Array, "P F"],
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    valid: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    *,
    places: AnchorPlaces,
    ignore_threshold: float = 0.5,
    box_loss: str = "l2",
) -> dict[str, Float[Array, ""]]:
    """The loss of one image: Darknet's yolo layer.

    box        sum over objects of (2 - w h) (H(target_xy, t_xy) + |t_wh - target_wh|^2 / 2),
               or of 1 - GIoU (or IoU, DIoU, CIoU) of the predicted box and the object
    object     sum over objects of H(1, t_o)
    no_object  sum over the background of H(0, t_o)
    class      sum over objects and classes of H([class is label], t_class)

    H(p, t) is the cross-entropy of p and sigmoid(t), w h the share of the image that
    the object covers.

    Args:
      raw: (t_x, t_y, t_w, t_h, t_o, logits of classes) at every place.
      boxes, labels: of the image.
      valid, ignored: which of them are objects, and which to be ignored.
      places: of the image.
      ignore_threshold: predictions that overlap an object by more are no background.
      box_loss: "l2", "iou", "giou", "diou" or "ciou".

    Raises:
      ValueError: no such box_loss.

    Source: Redmon and Farhadi 2018, sections 2.1 and 2.2 (arXiv:1804.02767);
    Darknet's yolo_layer.c.
    """
    if box_loss not in BOX_LOSSES:
        raise ValueError(f"yolo_losses: box_loss={box_loss!r} is none of {BOX_LOSSES}")
    cross_entropy = optax.sigmoid_binary_cross_entropy
    where = places.of(boxes)
    first = first_at(where, valid)
    found, own = places.decode(raw[:, :4]), raw[where]
    free = background(
        jax.lax.stop_gradient(found), where, first, boxes, valid, ignored, ignore_threshold
    )
    if box_loss == "l2":
        target = places.encode(boxes, where)
        offsets = cross_entropy(own[:, :2], target[:, :2])
        scales = jnp.square(own[:, 2:4] - target[:, 2:]) / 2
        box = places.size_weights(boxes) * (offsets + scales).sum(axis=1)
    else:
        box = iou_loss(found[where], boxes, box_loss)
    kinds = jax.nn.one_hot(labels, raw.shape[1] - 5)
    terms = {
        "box": box,
        "object": cross_entropy(own[:, 4], jnp.ones(len(boxes))),
        "class": cross_entropy(own[:, 5:], kinds).sum(axis=1),
    }
    terms = {name: jnp.where(first, term, 0).sum() for name, term in terms.items()}
    return {**terms, "no_object": (free * cross_entropy(raw[:, 4], jnp.zeros(len(raw)))).sum()}


class YoloHead(nn.Module):
    """Five convolutions, 1 x 1 and 3 x 3 by turns; the third makes room for a pyramid of maxima.

    Attributes:
      width: of the 1 x 1 ones; the others have twice as many channels.
      spp: `layers.SPP` in the place of the third.
      norm: "batch" or "frozen".
      dtype: of the computation; parameters are float32.
    """

    width: int
    spp: bool = False
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X F"]:
        """Returns a map of `width` channels."""
        options = {"norm": self.norm, "dtype": self.dtype}
        for i, (factor, size) in enumerate([(1, 1), (2, 3), (1, 1), (2, 3), (1, 1)], start=1):
            if i == 3 and self.spp:
                x = SPP(self.width, **options, name="spp")(x, train=train)
            else:
                unit = DarkConv(factor * self.width, size, **options, name=f"conv_{i}")
                x = unit(x, train=train)
        return x


class YoloV3(Detector):
    """Boxes on several maps of a backbone, each of which also knows the coarser ones.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: logits of each box.
      levels: the backbone's maps, from fine to coarse.
      anchors: widths and heights in pixels, for each level.
      widths: channels of the 1 x 1 convolutions of each level; the 3 x 3 ones have
        twice as many.
      spp: adds maxima over windows of 5, 9 and 13 to the coarsest map.
      box_loss: see `yolo_losses`.
      norm: of the convolutions, "batch" or "frozen".
      score_threshold, iou_threshold, max_detections: see `ops.select_detections`.
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 80
    levels: tuple[str, ...] = ("C3", "C4", "C5")
    anchors: tuple[tuple[Shape, ...], ...] = COCO_ANCHORS
    widths: tuple[int, ...] = (128, 256, 512)
    spp: bool = False
    box_loss: str = "l2"
    norm: str = "batch"
    score_threshold: float = 0.005
    iou_threshold: float = 0.45
    max_detections: int = 100
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> tuple[Float[Array, "B _ _ _"], ...]:
        """What the network says of every cell of every level.

        Args:
          images: with sides that are multiples of the largest stride.
          train: normalises by the batch; updates the collection "batch_stats".

        Returns:
          A map for each level, (B, V, U, A (5 + num_classes)): for each anchor t_x,
          t_y, t_w, t_h, t_o, logits.

        Raises:
          ValueError: the fields of levels differ in length, or the backbone has no
            such maps or does not take the images.
        """
        self._check()
        require_levels("YoloV3", self.backbone, self.levels, images)
        maps = self.backbone.features(images, train=train)
        unit = partial(DarkConv, norm=self.norm, dtype=self.dtype)
        head = partial(YoloHead, norm=self.norm, dtype=self.dtype)
        x, out = None, []
        for level, anchors, width in reversed(
            [*zip(self.levels, self.anchors, self.widths, strict=True)]
        ):
            own = maps[level].astype(self.dtype)
            if x is None:
                x = head(width, self.spp, name=f"head_{level}")(own, train=train)
            else:
                up = unit(width, 1, name=f"up_{level}")(x, train=train)
                up = resize(up, own.shape[1:3], method="nearest")
                x = jnp.concatenate([up, own], axis=-1)
                x = head(width, name=f"head_{level}")(x, train=train)
            last = unit(2 * width, 3, name=f"last_{level}")(x, train=train)
            outputs = len(anchors) * (5 + self.num_classes)
            predict = Predictor(outputs, dtype=self.dtype, name=f"predict_{level}")
            out.append(predict(last))
        return tuple(reversed(out))

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """See `yolo_losses`, here means over the images."""
        raw, places = self._raw(batch["image"], train=True)
        of_image = partial(yolo_losses, places=places, box_loss=self.box_loss)
        terms = jax.vmap(of_image)(raw, batch["boxes"], batch["box_labels"], *objects(batch))
        return {name: term.mean() for name, term in terms.items()}

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """The boxes of all places with score sigmoid(t_o) sigmoid(logits), and suppression."""
        raw, places = self._raw(images, train=False)

        def of_image(raw, size):
            scores = nn.sigmoid(raw[:, 4:5]) * nn.sigmoid(raw[:, 5:])
            return best_in_image(self, places.decode(raw[:, :4]), scores, size)

        return jax.vmap(of_image)(raw, image_sizes)

    def _raw(self, images: Array, *, train: bool) -> tuple[Float[Array, "B P F"], AnchorPlaces]:
        """The predictions of all places, and these."""
        maps = self(images, train=train)
        strides = tuple(self.backbone.feature_strides[level] for level in self.levels)
        places = AnchorPlaces(tuple(x.shape[1:3] for x in maps), strides, self.anchors)
        flat = [x.reshape(len(x), -1, 5 + self.num_classes) for x in maps]
        return jnp.concatenate(flat, axis=1), places

    def _check(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("levels", "anchors", "widths")}
        if len({*lengths.values()}) > 1:
            raise ValueError(f"YoloV3: the fields of levels differ in length: {lengths}")


@register_model
def yolo_v3(**overrides) -> YoloV3:
    """YOLO v3 on Darknet-53 for the 80 classes of COCO."""
    return YoloV3(**{"backbone": darknet53(num_classes=0), **overrides})
