"""CornerNet: an object is a pair of corners that know each other.

Paper    Law and Deng 2018, "CornerNet: Detecting Objects as Paired Keypoints"
         (arXiv:1808.01244): sections 3.2 to 3.4, figures 4 and 7, the loss of section 4.1
         and the inference of section 4.2, but of an image without its mirror image.
Differs  Pull and push losses are means over the images of a batch, the others sums over
         its objects divided by their number. Where boxes are ignored, their class is
         not taught.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.models.detection.detector import Batch, Detector, objects
from jaxmodels.models.detection.points import (
    HEAT_BIAS,
    PointHead,
    at_cells,
    best_cells,
    cells_of,
    finest_maps,
    heat_loss,
    mean_over,
    ranked,
    taught_cells,
)
from jaxmodels.models.vision.hourglass import hourglass104
from jaxmodels.ops.corner_pooling import corner_pool
from jaxmodels.ops.detection_losses import smooth_l1
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.heat_maps import gaussian_radius, splat_gaussians
from jaxmodels.ops.nms import soft_nms
from jaxmodels.registry import register_model

# Embeddings of different objects are pushed this far apart.
_MARGIN = 1.0
_POOLS = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}


class CornerMaps(NamedTuple):
    """What the heads say of one kind of corner at every cell of a map.

    Attributes:
      heat: logits of a corner of each class.
      embeddings: alike for both corners of an object.
      offsets: from the cell's upper left to the corner, x and y, in cells.
    """

    heat: Float[Array, "*B Y X K"]
    embeddings: Float[Array, "*B Y X 1"]
    offsets: Float[Array, "*B Y X 2"]


class CornerPooling(nn.Module):
    """A residual block whose first convolution looks along a row and a column (figure 7).

    Attributes:
      directions: of the two poolings, which are added.
      width: channels of the pooled maps.
      norm: "batch" or "frozen".
      dtype: of the computation.
    """

    directions: tuple[str, str]
    width: int
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X C"]:
        """Returns a map of the same shape."""
        unit, channels = partial(ConvNorm, norm=self.norm, dtype=self.dtype), x.shape[-1]
        pooled = sum(
            corner_pool(unit(self.width, 3, name=direction)(x, train=train), direction)
            for direction in self.directions
        )
        plain = {"activation": None}
        pooled = unit(channels, 3, **plain, name="pooled")(pooled, train=train)
        shortcut = unit(channels, 1, **plain, name="shortcut")(x, train=train)
        return unit(channels, 3, name="out")(nn.relu(pooled + shortcut), train=train)


class CornerNet(Detector):
    """Corner pooling and three heads for each kind of corner, on the finest maps of a backbone.

    Several maps of one stride, as an hourglass has, are each taught (the mean of their
    losses is taken), and the last one detects.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: K.
      pool_width: channels of the pooled maps.
      head_width: channels inside the heads.
      min_overlap: of the box of two corners with the object's, if both are as far off
        as the heat map forgives.
      embedding_weight: of the terms that teach embeddings; the paper's 0.1 needs many
        thousand steps before the corners of an object are found to belong together.
      corners: of each kind that are paired.
      max_distance: of the embeddings of a pair.
      candidates: best pairs that go into suppression.
      max_detections: boxes of an image.
      norm: "batch" or "frozen".
      dtype: of the heads; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 80
    pool_width: int = 128
    head_width: int = 256
    min_overlap: float = 0.3
    embedding_weight: float = 0.1
    corners: int = 100
    max_distance: float = 0.5
    candidates: int = 1000
    max_detections: int = 100
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> tuple[tuple[CornerMaps, CornerMaps], ...]:
        """The maps of both kinds of corner for each of the finest maps; raises as the backbone."""
        maps, found = self.backbone.features(images, train=train), []
        for name in finest_maps(self.backbone.feature_strides)[0]:
            x = maps[name].astype(self.dtype)
            found.append(
                tuple(
                    self._corner(x, directions, f"{kind}_{name}", train)
                    for kind, directions in _POOLS.items()
                )
            )
        return tuple(found)

    def _corner(
        self, x: Float[Array, "B Y X C"], directions: tuple[str, str], name: str, train: bool
    ) -> CornerMaps:
        """Pooling and heads of one kind of corner (figure 4)."""
        options = {"norm": self.norm, "dtype": self.dtype, "name": f"{name}_pooling"}
        x = CornerPooling(directions, self.pool_width, **options)(x, train=train)
        head = partial(PointHead, width=self.head_width, dtype=self.dtype)
        return CornerMaps(
            head(self.num_classes, bias=HEAT_BIAS, name=f"{name}_heat")(x),
            head(1, name=f"{name}_embeddings")(x),
            head(2, name=f"{name}_offsets")(x),
        )

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The four terms of section 4.1, weighted."""
        there, ignored = objects(batch)
        found = self(batch["image"], train=True)
        _, stride = finest_maps(self.backbone.feature_strides)
        options = {"stride": stride, "min_overlap": self.min_overlap}
        one = partial(corner_targets, shape=found[0][0].heat.shape[1:], **options)
        targets = jax.vmap(one)(batch["boxes"], batch["box_labels"], there, ignored)
        terms = [corner_losses(each, targets, there, self.embedding_weight) for each in found]
        return jax.tree.map(lambda *losses: sum(losses) / len(losses), *terms)

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """Pairs of the best corners of the last map, after soft suppression of each class."""
        *_, kinds = self(images)
        _, stride = finest_maps(self.backbone.feature_strides)

        def one(kinds, size):
            corners = [_best_corners(maps, size, stride, self.corners) for maps in kinds]
            pairs = pair_corners(*corners, self.max_distance)
            boxes, scores, classes, valid = ranked(*pairs, self.candidates)
            faded = soft_nms(boxes, scores, method="gaussian", classes=classes, valid=valid)
            return ranked(boxes, faded, classes, valid, self.max_detections)

        return jax.vmap(one)(kinds, image_sizes)


class CornerTargets(NamedTuple):
    """What maps are to learn of one kind of corner of an image's objects.

    Attributes:
      heat: 1 at each corner, less around it.
      taught: where the heat is known: not in an ignored box of the class.
      cells: column and row of each corner.
      offsets: at these cells, as of `CornerMaps`.
    """

    heat: Float[Array, "*B Y X K"]
    taught: Bool[Array, "*B Y X K"]
    cells: Int[Array, "*B N 2"]
    offsets: Float[Array, "*B N 2"]


def corner_targets(
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    there: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    *,
    shape: tuple[int, int, int],
    stride: int,
    min_overlap: float,
) -> tuple[CornerTargets, CornerTargets]:
    """Gaussians around the upper left and around the lower right corners of objects.

    Args:
      boxes, labels: of an image.
      there: which boxes are objects.
      ignored: which boxes are neither objects nor background.
      shape: rows, columns and classes of the map.
      stride: pixels a cell.
      min_overlap: as of `CornerNet`.

    Source: Law and Deng 2018, section 3.2, equation 2 (arXiv:1808.01244).
    """
    sizes = (boxes[:, 2:] - boxes[:, :2]) / stride
    radii = gaussian_radius(sizes[:, 1], sizes[:, 0], min_overlap)
    taught = taught_cells(shape[:2], stride, boxes, labels, ignored, shape[2])

    def one(points):
        cells, offsets = cells_of(points, shape[:2], stride)
        heat = splat_gaussians(cells, radii, labels, there, shape)
        return CornerTargets(heat, taught, cells, offsets)

    return one(boxes[:, :2]), one(boxes[:, 2:])


def corner_losses(
    found: tuple[CornerMaps, CornerMaps],
    targets: tuple[CornerTargets, CornerTargets],
    there: Bool[Array, "B N"],
    embedding_weight: float,
) -> dict[str, Float[Array, ""]]:
    """The focal loss of both heat maps, smooth L1 of offsets, and what embeddings are to do.

    pull = 1/N sum_k (e_tk - e_k)^2 + (e_bk - e_k)^2,  e_k = (e_tk + e_bk) / 2
    push = 1/(N (N - 1)) sum_k sum_(j /= k) max(0, 1 - |e_k - e_j|)

    Args:
      found: of the upper left and the lower right corners.
      targets: of both, of a batch.
      there: which objects there are.
      embedding_weight: factor on pull and push.

    Returns:
      "heat", "offsets", "pull" and "push".

    Source: Law and Deng 2018, equations 1 and 3 to 5, and section 4.1
    (arXiv:1808.01244).
    """
    heat = offsets = 0.0
    embeddings = []
    for maps, wanted in zip(found, targets, strict=True):
        heat += heat_loss(maps.heat, wanted.heat, wanted.taught)
        apart = jax.vmap(at_cells)(maps.offsets, wanted.cells) - wanted.offsets
        offsets += mean_over(there, smooth_l1(apart).sum(axis=-1))
        embeddings.append(jax.vmap(at_cells)(maps.embeddings, wanted.cells)[..., 0])
    pull, push = jax.vmap(_pull_and_push)(*embeddings, there)
    pull, push = embedding_weight * pull.mean(), embedding_weight * push.mean()
    return {"heat": heat, "offsets": offsets, "pull": pull, "push": push}


def _pull_and_push(first: Float[Array, "N"], second: Float[Array, "N"], there: Bool[Array, "N"]):
    """Equations 4 and 5 of one image; zero where there are too few objects."""
    count, middle = there.sum(), (first + second) / 2
    pull = mean_over(there, (first - middle) ** 2 + (second - middle) ** 2)
    others = there[:, None] & there[None, :] & ~jnp.eye(len(there), dtype=bool)
    apart = jnp.abs(middle[:, None] - middle[None, :])
    push = jnp.where(others, nn.relu(_MARGIN - apart), 0).sum()
    return pull, push / jnp.maximum(count * (count - 1), 1)


class Corners(NamedTuple):
    """The best corners of one kind in an image.

    Attributes:
      points: (x, y) in pixels.
      scores: in [0, 1].
      classes: from 0.
      embeddings: alike for the corners of one object.
    """

    points: Float[Array, "P 2"]
    scores: Float[Array, "P"]
    classes: Int[Array, "P"]
    embeddings: Float[Array, "P"]


def pair_corners(
    top_left: Corners, bottom_right: Corners, max_distance: float
) -> tuple[Float[Array, "M 4"], Float[Array, "M"], Int[Array, "M"], Bool[Array, "M"]]:
    """The box of every pair of an upper left and a lower right corner, and which may be one.

    A pair may be a box if both are of one class, their embeddings differ by
    max_distance at the most, and the second is to the right of and below the first.

    Args:
      top_left, bottom_right: P and Q corners.
      max_distance: of the embeddings.

    Returns:
      Boxes of all M = P Q pairs, the second corner changing fastest; the means of their
      scores; the first corner's class; and whether the pair may be a box.

    Source: Law and Deng 2018, section 4.2 (arXiv:1808.01244).
    """
    first, second = (
        jax.tree.map(partial(jnp.expand_dims, axis=axis), each)
        for axis, each in ((1, top_left), (0, bottom_right))
    )
    valid = (first.scores > 0) & (second.scores > 0) & (first.classes == second.classes)
    valid &= jnp.abs(first.embeddings - second.embeddings) <= max_distance
    valid &= (second.points > first.points).all(axis=-1)
    shape = valid.shape
    corners = [jnp.broadcast_to(each.points, (*shape, 2)) for each in (first, second)]
    scores = (first.scores + second.scores) / 2
    classes = jnp.broadcast_to(first.classes, shape)
    boxes = jnp.concatenate(corners, axis=-1).reshape(-1, 4)
    return boxes, scores.ravel(), classes.ravel(), valid.ravel()


def _best_corners(maps: CornerMaps, size: Float[Array, "2"], stride: int, count: int) -> Corners:
    scores, classes, cells = best_cells(maps.heat, size, stride, count)
    points = stride * (cells + at_cells(maps.offsets, cells))
    points = jnp.clip(points, 0, size[None, ::-1])
    return Corners(points, scores, classes, at_cells(maps.embeddings, cells)[:, 0])


@register_model
def cornernet_hourglass104(**overrides) -> CornerNet:
    """CornerNet on Hourglass-104, for the 80 classes of COCO."""
    return CornerNet(**{"backbone": hourglass104(), **overrides})
