"""Region proposals: a small network over maps that says where objects may be.

Paper    Ren et al. 2015, "Faster R-CNN" (arXiv:1506.01497), section 3.1 and figure 3;
         over the maps of a pyramid with one size of anchor each as Lin et al. 2017
         (arXiv:1612.03144), section 4.1.
Differs  Anchors that cross the border of the image train and propose like all others
         (Lin et al.). The 3 x 3 convolution starts with He's deviation, not 0.01, so that
         narrow networks learn; the other two start with 0.01. One sigmoid a box is the
         paper's softmax of two. Proposals and thresholds follow torchvision:
         suppression on each map by itself, base anchors rounded to whole halves,
         smooth L1 with its corner at 1/9.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodels.layers.convolution import Conv
from jaxmodels.ops.anchors import anchor_shapes, grid_anchors
from jaxmodels.ops.box_coding import decode_deltas, encode_deltas
from jaxmodels.ops.box_overlaps import pairwise_intersection_over_area, pairwise_iou
from jaxmodels.ops.box_sampling import sample_balanced
from jaxmodels.ops.boxes import clip_boxes
from jaxmodels.ops.detection_losses import smooth_l1
from jaxmodels.ops.matching import BACKGROUND, IGNORED, match_by_threshold
from jaxmodels.ops.nms import class_wise_nms

SMOOTH_L1_CORNER = 1 / 9
# A region is not background where more than this share of it is in an ignored box.
_IGNORED_SHARE = 0.5
_MIN_SIDE = 1e-3
_predictor_init = nn.initializers.normal(0.01)


class AnchorScores(NamedTuple):
    """What the network says of every anchor, map by map.

    Attributes:
      logits: (B, A) for each map; positive where an object is likely.
      deltas: (B, A, 4) for each map, from the anchors to the boxes.
      anchors: (A, 4) for each map, xyxy in pixels.
    """

    logits: tuple[Float[Array, "B _"], ...]
    deltas: tuple[Float[Array, "B _ 4"], ...]
    anchors: tuple[Float[Array, "_ 4"], ...]


class Proposals(NamedTuple):
    """Boxes that may hold objects, best first.

    Attributes:
      boxes: xyxy in pixels; no gradient flows through them.
      scores: in [0, 1]; 0 where not valid.
      valid: whether the place holds a proposal.
    """

    boxes: Float[Array, "B N 4"]
    scores: Float[Array, "B N"]
    valid: Bool[Array, "B N"]


class RegionProposals(nn.Module):
    """The network of figure 3, shared by all maps, with its loss and its proposals.

    Attributes:
      strides: pixels between the neighbours of each map.
      anchor_sizes: square roots of the areas of the anchors, for each map.
      anchor_ratios: heights over widths.
      width: channels between the convolutions; None is those of the first map.
      candidates: best anchors of each map that go into suppression, in training and
        in inference.
      count: proposals of an image, in training and in inference.
      iou_threshold: of the suppression.
      samples: anchors of an image in the loss.
      positive_share: the most of them that are objects.
      positive, negative: overlaps from and below which anchors are objects, background.
      dtype: of the computation; parameters are float32.
    """

    strides: tuple[int, ...]
    anchor_sizes: tuple[tuple[float | int, ...], ...]
    anchor_ratios: tuple[float | int, ...] = (0.5, 1.0, 2.0)
    width: int | None = None
    candidates: tuple[int, int] = (2000, 1000)
    count: tuple[int, int] = (2000, 1000)
    iou_threshold: float = 0.7
    samples: int = 256
    positive_share: float = 0.5
    positive: float = 0.7
    negative: float = 0.3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Float[Array, "B _ _ C"]]) -> AnchorScores:
        """Scores all anchors.

        Args:
          maps: of equal channels, in the order of the strides.

        Raises:
          ValueError: numbers of maps, strides and sizes disagree.
        """
        self._check(maps)
        kinds = len(self.anchor_sizes[0]) * len(self.anchor_ratios)
        shared = Conv(self.width or maps[0].shape[-1], 3, dtype=self.dtype, name="conv")
        options = {"kernel_init": _predictor_init, "dtype": self.dtype}
        objectness = Conv(kinds, 1, **options, name="objectness")
        boxes = Conv(4 * kinds, 1, **options, name="boxes")
        logits, deltas = [], []
        for each in maps:
            hidden = nn.relu(shared(each))
            logits.append(objectness(hidden).reshape(len(each), -1))
            deltas.append(boxes(hidden).reshape(len(each), -1, 4))
        logits, deltas = jax.tree.map(lambda x: x.astype(jnp.float32), (logits, deltas))
        return AnchorScores(tuple(logits), tuple(deltas), self._anchors(maps))

    def _anchors(self, maps: Sequence[Array]) -> tuple[Float[Array, "A 4"], ...]:
        """Centred on the pixels that the maps' values are centred on, as torchvision's."""
        anchors = []
        for each, stride, sizes in zip(maps, self.strides, self.anchor_sizes, strict=True):
            shapes = 2 * jnp.round(anchor_shapes(sizes, self.anchor_ratios) / 2)
            grid = grid_anchors(shapes, each.shape[1:3], stride, centred_in_cell=False)
            anchors.append(grid.reshape(-1, 4))
        return tuple(anchors)

    @nn.nowrap
    def proposals(
        self, scored: AnchorScores, sizes: Float[Array, "B 2"], *, train: bool
    ) -> Proposals:
        """The best boxes: the best anchors of each map, decoded, cut and thinned out.

        Args:
          scored: what the call returned.
          sizes: rows and columns of each image without its padding.
          train: which of `candidates` and `count` to take.

        Returns:
          `count` places for each image, fewer only where there are fewer candidates.
        """
        which = 0 if train else 1
        limits = [min(self.candidates[which], each.shape[1]) for each in scored.logits]
        count = min(self.count[which], sum(limits))
        level = jnp.asarray(np.repeat(np.arange(len(limits)), limits))

        def one(logits, deltas, size):
            best = [
                _best(*each, limit)
                for *each, limit in zip(logits, deltas, scored.anchors, limits, strict=True)
            ]
            scores, boxes = (jnp.concatenate(parts) for parts in zip(*best, strict=True))
            boxes = clip_boxes(boxes, size)
            valid = (boxes[:, 2:] - boxes[:, :2] >= _MIN_SIDE).all(axis=-1)
            keep = class_wise_nms(boxes, scores, level, self.iou_threshold, valid=valid)
            top, chosen = lax.top_k(jnp.where(keep, scores, -jnp.inf), count)
            return Proposals(boxes[chosen], nn.sigmoid(top), keep[chosen])

        scored = lax.stop_gradient(scored)
        return jax.vmap(one)(scored.logits, scored.deltas, sizes)

    @nn.nowrap
    def losses(
        self,
        scored: AnchorScores,
        boxes: Float[Array, "B N 4"],
        there: Bool[Array, "B N"],
        ignored: Bool[Array, "B N"],
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, ""]]:
        """The two terms of equation 1, over a sample of anchors of each image.

        sum of -log p(object or not) / sampled + sum over objects of smooth L1 / sampled

        Args:
          scored: what the call returned.
          boxes: of the objects.
          there: which boxes are objects to find.
          ignored: which boxes are neither objects nor background.
          key: for the samples.

        Returns:
          "proposal_objectness" and "proposal_boxes".
        """
        logits, deltas = (jnp.concatenate(each, axis=1) for each in scored[:2])
        anchors = jnp.concatenate(scored.anchors)

        def one(boxes, there, ignored, key):
            matches = match_regions(
                anchors, boxes, there, ignored, self.positive, self.negative, rescue=True
            )
            found, background = sample_balanced(key, matches, self.samples, self.positive_share)
            matched = jnp.where(found[:, None], boxes[jnp.maximum(matches, 0)], anchors)
            return found, background, encode_deltas(matched, anchors)

        keys = jax.random.split(key, len(boxes))
        found, background, targets = jax.vmap(one)(boxes, there, ignored, keys)
        sampled = found | background
        total = jnp.maximum(sampled.sum(), 1)
        objectness = optax.sigmoid_binary_cross_entropy(logits, found.astype(jnp.float32))
        distances = smooth_l1(deltas - targets, SMOOTH_L1_CORNER).sum(axis=-1)
        return {
            "proposal_objectness": jnp.where(sampled, objectness, 0).sum() / total,
            "proposal_boxes": jnp.where(found, distances, 0).sum() / total,
        }

    def _check(self, maps: Sequence[Array]) -> None:
        counts = {"strides": self.strides, "anchor_sizes": self.anchor_sizes, "maps": maps}
        counts = {name: len(each) for name, each in counts.items()}
        if len({*counts.values()}) != 1:
            raise ValueError(f"RegionProposals: {counts} must be equally many, one for each map")
        if len({len(each) for each in self.anchor_sizes}) != 1:
            raise ValueError(
                f"RegionProposals: anchor_sizes={self.anchor_sizes} differ in number between maps, "
                f"which share one network; give each map as many"
            )


def match_regions(
    regions: Float[Array, "A 4"],
    boxes: Float[Array, "N 4"],
    there: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    positive: float,
    negative: float,
    *,
    rescue: bool,
) -> Int[Array, "A"]:
    """Which object each region holds: its index, -1 for background, -2 for neither.

    Args:
      regions: anchors or proposals.
      boxes: of objects and of what is to be ignored.
      there: which boxes are objects.
      ignored: which boxes are to be ignored; a region with more than half its area in
        one of them is not background.
      positive, negative: overlaps from and below which a region is an object, background.
      rescue: gives every object the regions that overlap it most, however little.

    Source: Ren et al. 2015, section 3.1.2 (arXiv:1506.01497).
    """
    matches = match_by_threshold(
        pairwise_iou(regions, boxes), there, positive=positive, negative=negative, rescue=rescue
    )
    # Of a data set without such boxes this is a constant, and XLA would fold all that
    # follows, anchor by anchor, in seconds to minutes.
    ignored = lax.optimization_barrier(ignored)
    within = pairwise_intersection_over_area(regions, boxes) > _IGNORED_SHARE
    unclear = (within & ignored[None, :]).any(axis=1)
    return jnp.where((matches == BACKGROUND) & unclear, IGNORED, matches)


def _best(logits: Array, deltas: Array, anchors: Array, count: int) -> tuple[Array, Array]:
    scores, chosen = lax.top_k(logits, count)
    return scores, decode_deltas(deltas[chosen], anchors[chosen])
