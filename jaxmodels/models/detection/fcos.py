"""FCOS: every point inside an object says how far its four sides are.

Paper    Tian et al. 2019, "FCOS: Fully Convolutional One-Stage Object Detection"
         (arXiv:1904.01355): sections 3.1 to 3.3 and figure 2, with the improvements
         of table 3: centre-ness beside the boxes, centre sampling with a radius of 1.5
         strides, the GIoU loss, and distances in strides.
Differs  Convolutions start with He's deviation where norms follow, not 0.01. The best 1,000
         scores of all levels, not of each, go into suppression. Where boxes are
         ignored, their class is not taught.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.layers.convolution import Conv
from jaxmodels.models.detection.detector import Batch, Detector, objects
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.detection.points import Predictor, covered
from jaxmodels.models.vision.resnet import resnet50
from jaxmodels.ops.anchors import grid_points
from jaxmodels.ops.box_coding import decode_distances, encode_distances
from jaxmodels.ops.boxes import clip_boxes
from jaxmodels.ops.detection_losses import iou_loss
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.matching import centre_sampling
from jaxmodels.ops.select_detections import select_detections
from jaxmodels.registry import register_model

# The overlap's loss for each box loss that has one.
_BOX_LOSSES = {"giou": "giou", "iou": "log_iou", "l1": None}
# The chance of an object that every point starts with (Lin et al. 2017, section 4.1).
_PRIOR = 0.01
# 32 groups in towers of 256 channels, and fewer in narrower ones.
_GROUP = 8


class Places(NamedTuple):
    """The points of all levels, one after the other.

    Attributes:
      points: (x, y) in pixels.
      strides: of each point's level, in pixels.
      size_ranges: smallest and largest distance to a side that it is for.
    """

    points: Float[Array, "A 2"]
    strides: Float[Array, "A"]
    size_ranges: Float[Array, "A 2"]


class PointScores(NamedTuple):
    """What the network says of every point.

    Attributes:
      logits: of each class.
      distances: to the left, top, right and bottom side, in pixels.
      centreness: its logit.
      places: the points.
    """

    logits: Float[Array, "B A K"]
    distances: Float[Array, "B A 4"]
    centreness: Float[Array, "B A"]
    places: Places


class Tower(nn.Module):
    """3 x 3 convolutions, each with group norm and ReLU.

    Attributes:
      width: channels; a multiple of 8, the channels of a group.
      depth: number of convolutions.
      dtype: of the computation.
    """

    width: int
    depth: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X F"]:
        """Returns a map of the same size."""
        for i in range(self.depth):
            x = Conv(self.width, 3, dtype=self.dtype, name=f"conv_{i}")(x)
            norm = nn.GroupNorm(
                num_groups=None,
                group_size=_GROUP,
                epsilon=1e-5,
                dtype=self.dtype,
                name=f"norm_{i}",
            )
            x = nn.relu(norm(x))
        return x


class FCOS(Detector):
    """Two towers and three predictions, shared by all maps of a backbone (figure 2).

    Attributes:
      backbone: a module whose `features` are maps of equal channels, finest first.
      num_classes: K.
      size_limits: between the levels, in pixels: an object belongs to the first level
        whose limit no side exceeds, seen from a point; one fewer than there are maps.
      head_width: channels of the towers, a multiple of 8.
      head_depth: convolutions of each tower.
      box_loss: "giou", "iou" (of table 2, -log IoU), or "l1", the mean error of the four
        distances in strides.
      score_threshold: of a class before centre-ness comes in.
      iou_threshold: of the suppression.
      max_detections: boxes of an image.
      dtype: of the heads; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 80
    size_limits: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    head_width: int = 256
    head_depth: int = 4
    box_loss: str = "giou"
    score_threshold: float = 0.05
    iou_threshold: float = 0.6
    max_detections: int = 100
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B Y X C"], *, train: bool = False) -> PointScores:
        """Scores all points of all levels.

        Args:
          images: of any size that the backbone takes.
          train: passed to the backbone.

        Raises:
          ValueError: fields contradict each other, or the backbone does not take the
            images.
        """
        self._check()
        maps = [*self.backbone.features(images, train=train).values()]
        tower = partial(Tower, self.head_width, self.head_depth, dtype=self.dtype)
        class_tower, box_tower = tower(name="class_tower"), tower(name="box_tower")
        predictor = partial(Predictor, kernel_size=3, dtype=self.dtype)
        prior = -math.log((1 - _PRIOR) / _PRIOR)
        classes = predictor(self.num_classes, bias=prior, name="classes")
        sides, middle = predictor(4, name="distances"), predictor(1, name="centreness")
        scales = self.param("scales", nn.initializers.ones, (len(maps),))
        strides, levels = self.backbone.feature_strides.values(), []
        for x, stride, scale in zip(maps, strides, scales, strict=True):
            boxes = box_tower(x.astype(self.dtype))
            made = (
                classes(class_tower(x.astype(self.dtype))),
                stride * jnp.exp(scale * sides(boxes)),
                middle(boxes),
            )
            levels.append([each.reshape(len(x), -1, each.shape[-1]) for each in made])
        logits, distances, centreness = (
            jnp.concatenate(parts, axis=1) for parts in zip(*levels, strict=True)
        )
        return PointScores(logits, distances, centreness[..., 0], self._places(maps))

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Equation 2 and the binary cross entropy of centre-ness, all over the positives."""
        there, ignored = objects(batch)
        found = self(batch["image"], train=True)
        one = partial(fcos_targets, found.places, num_classes=self.num_classes)
        targets = jax.vmap(one)(batch["boxes"], batch["box_labels"], there, ignored)
        return fcos_losses(found, targets, self.box_loss)

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """Points' boxes after suppression, scored by class times centre-ness."""
        found = self(images)
        points = found.places.points

        def one(logits, distances, centreness, size):
            scores = nn.sigmoid(logits)
            seen = (scores > self.score_threshold) & (points < size[None, ::-1]).all(-1)[:, None]
            scores = jnp.where(seen, scores * nn.sigmoid(centreness)[:, None], 0)
            return select_detections(
                clip_boxes(decode_distances(points, distances), size),
                scores,
                score_threshold=0.0,
                iou_threshold=self.iou_threshold,
                max_detections=self.max_detections,
            )

        return jax.vmap(one)(*found[:3], image_sizes)

    def _places(self, maps: list[Float[Array, "B _ _ C"]]) -> Places:
        """In the order of the maps' rows."""
        limits, places = (0.0, *self.size_limits, math.inf), []
        for i, stride in enumerate(self.backbone.feature_strides.values()):
            points = grid_points(maps[i].shape[1:3], stride).reshape(-1, 2)
            count = len(points)
            ranges = jnp.broadcast_to(jnp.array([limits[i : i + 2]]), (count, 2))
            places.append(Places(points, jnp.full(count, float(stride)), ranges))
        return Places(*(jnp.concatenate(parts) for parts in zip(*places, strict=True)))

    def _check(self) -> None:
        strides = self.backbone.feature_strides
        if len(self.size_limits) != len(strides) - 1:
            raise ValueError(
                f"FCOS: size_limits={self.size_limits} must be one fewer than the backbone's maps, "
                f"which are {strides}"
            )
        if self.box_loss not in _BOX_LOSSES:
            raise ValueError(f"FCOS: box_loss={self.box_loss!r} is none of {[*_BOX_LOSSES]}")
        if self.head_width % _GROUP:
            raise ValueError(
                f"FCOS: head_width={self.head_width} is not a multiple of {_GROUP}, the channels "
                f"of a group of its norms"
            )


class FCOSTargets(NamedTuple):
    """What points are to learn.

    Attributes:
      labels: whether the point is to find an object of the class.
      taught: whether that is known: False for a class of which an ignored box
        is around the point.
      distances: to the sides of its object, in pixels; ones without an object.
      centreness: 1 in the middle of its object, 0 at its sides, 1 without an object.
    """

    labels: Bool[Array, "*B A K"]
    taught: Bool[Array, "*B A K"]
    distances: Float[Array, "*B A 4"]
    centreness: Float[Array, "*B A"]


def fcos_targets(
    places: Places,
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    there: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    *,
    num_classes: int,
) -> FCOSTargets:
    """The object of every point of an image, and its distances and centre-ness.

    centreness = sqrt(min(l, r) / max(l, r) min(t, b) / max(t, b))

    Args:
      places: the points.
      boxes, labels: of an image.
      there: which boxes are objects.
      ignored: which boxes are neither objects nor background.
      num_classes: K.

    Source: Tian et al. 2019, sections 3.1 to 3.3, equations 1 and 3
    (arXiv:1904.01355).
    """
    points = places.points
    matches = centre_sampling(
        points, boxes, there, strides=places.strides, size_ranges=places.size_ranges
    )
    positive, matches = matches >= 0, jnp.maximum(matches, 0)
    classes = jnp.where(positive, labels[matches], -1)
    learnt = classes[:, None] == jnp.arange(num_classes)[None, :]
    taught = learnt | ~covered(points, boxes, labels, ignored, num_classes)
    distances = jnp.where(positive[:, None], encode_distances(points, boxes[matches]), 1.0)
    across, down = distances[:, ::2], distances[:, 1::2]
    shares = [side.min(axis=-1) / side.max(axis=-1) for side in (across, down)]
    return FCOSTargets(learnt, taught, distances, jnp.sqrt(shares[0] * shares[1]))


def fcos_losses(
    found: PointScores, targets: FCOSTargets, box_loss: str
) -> dict[str, Float[Array, ""]]:
    """The focal loss of all points, and the losses of boxes and centre-ness of positive ones.

    All are divided by the number of positive points of the batch.

    Args:
      found: what the network says.
      targets: what it should say.
      box_loss: as of `FCOS`.

    Returns:
      "classes", "boxes" and "centreness".

    Source: Tian et al. 2019, equation 2 and section 3.3 (arXiv:1904.01355).
    """
    positive = targets.labels.any(axis=-1)
    focal = optax.sigmoid_focal_loss(found.logits, targets.labels, alpha=0.25, gamma=2.0)
    centreness = optax.sigmoid_binary_cross_entropy(found.centreness, targets.centreness)
    terms = {
        "classes": jnp.where(targets.taught, focal, 0).sum(axis=-1),
        "boxes": jnp.where(positive, _box_losses(found, targets, box_loss), 0),
        "centreness": jnp.where(positive, centreness, 0),
    }
    count = jnp.maximum(positive.sum(), 1)
    return {name: term.sum() / count for name, term in terms.items()}


def _box_losses(found: PointScores, targets: FCOSTargets, kind: str) -> Float[Array, "B A"]:
    (points, strides, _), wanted = found.places, targets.distances
    if kind == "l1":
        return jnp.abs(found.distances - wanted).mean(axis=-1) / strides[None]
    boxes, objects = (decode_distances(points[None], each) for each in (found.distances, wanted))
    return iou_loss(boxes, objects, kind=_BOX_LOSSES[kind])


@register_model
def fcos_resnet50_fpn(**overrides) -> FCOS:
    """FCOS on the maps P3 to P7 of a ResNet-50, for the 80 classes of COCO."""
    stages = resnet50(num_classes=0, norm="frozen")
    backbone = FeaturePyramid(stages, levels=("C3", "C4", "C5"), extra="conv")
    return FCOS(**{"backbone": backbone, **overrides})
