"""TridentNet: three branches that differ in what they see at once, and in nothing else.

Paper    Li et al. 2019, "Scale-Aware Trident Networks for Object Detection"
         (arXiv:1901.01892): the blocks of section 3.2 and figure 3 (c), the training of
         section 3.3 and equation 1, and the inference of section 3.4 and of section
         4.4, "Fast inference approximation".
Differs  Blocks follow a map of any backbone; on the first block of a ResNet's conv4 they
         are the paper's, which are all others of that stage. Anchors that lie by more
         than half in an object of another branch's scale are left out, where the
         authors leave out those of an overlap above 0.3. Proposals are filtered by
         scale after their suppression. All classes share the boxes, as in the authors'
         code, which also pools 7 x 7 values and drops the stride of the head.
"""

import math
from functools import partial
from typing import TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Shaped

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.linear import Linear
from jaxmodels.models.detection.detector import Batch, Detector, image_sizes, objects
from jaxmodels.models.detection.faster_rcnn import StageHead
from jaxmodels.models.detection.region_proposals import AnchorScores, Proposals, RegionProposals
from jaxmodels.models.detection.roi_heads import (
    best_detections,
    roi_boxes,
    roi_losses,
    roi_targets,
    sample_targets,
)
from jaxmodels.models.vision.residual_variants import VariantBlock
from jaxmodels.models.vision.resnet import resnet101
from jaxmodels.ops.boxes import box_area
from jaxmodels.ops.convolution import convolution
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.roi_align import roi_align
from jaxmodels.registry import register_model

# Smallest and largest side of each branch.
Ranges: TypeAlias = tuple[tuple[float | int, float | int], ...]


class BranchedConv(Conv):
    """A convolution with one kernel, and a dilation of its own for each branch.

    Attributes:
      branches: factors of `dilation`; their images lie one after the other along the
        batch.
      others: as of `Conv`, without groups and bias.
    """

    branches: tuple[int, ...] = (1,)

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels, branch after branch."""
        size = self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (size, size, x.shape[-1], self.features))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        outputs = []
        for part, factor in zip(jnp.split(x, len(self.branches)), self.branches, strict=True):
            dilation = factor * self.dilation
            padding = dilation * (size - 1) // 2
            options = {"stride": self.stride, "dilation": dilation, "padding": padding}
            outputs.append(convolution(part, kernel, **options))
        return jnp.concatenate(outputs)


class TridentStage(nn.Module):
    """Residual blocks that see their input at several dilations, with the same weights.

    The branches are stacked along the batch, so everything but the dilated convolutions
    runs once, and norms count them as more images.

    Attributes:
      depth: number of blocks.
      bottleneck, norm, dtype: of the blocks, see `ResidualBlock`.
    """

    depth: int
    bottleneck: bool
    norm: str
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Y X C"], dilations: tuple[int, ...], *, train: bool
    ) -> Float[Array, "G Y X C"]:
        """Returns G = B len(dilations) maps, branch after branch."""
        x = stack_branches(x, len(dilations))
        for i in range(self.depth):
            block = VariantBlock(
                x.shape[-1],
                self.bottleneck,
                norm=self.norm,
                dtype=self.dtype,
                conv=partial(BranchedConv, branches=dilations),
                name=f"block_{i}",
            )
            x = block(x, train=train)
        return x


class TridentNet(Detector):
    """A trident stage on one map of a backbone, and proposals and a head for each branch.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: without the background.
      level: the backbone's map that the trident stage follows.
      depth: number of trident blocks.
      bottleneck: kind of the blocks, see `ResidualBlock`.
      dilations: of the branches.
      ranges: smallest and largest side, the root of the area in pixels, of the objects
        that each branch is for.
      fast: detects with the middle branch alone, for objects of all sizes. Train for it
        with ranges (0, infinity) for all branches, as published.
      anchor_sizes: square roots of their areas.
      anchor_ratios: heights over widths.
      proposal_width: channels of the proposals' network.
      candidates, proposals: of a branch, in training and in inference, `candidates` and
        `count` of `RegionProposals`.
      proposal_samples: anchors of a branch of an image in the loss.
      region_size: of what is pooled from a RoI, values a side.
      head: from pooled RoIs (N, PY, PX, C) to vectors (N, F).
      region_samples: RoIs of a branch of an image that the head learns from.
      score_threshold, iou_threshold, max_detections: of what `detect` returns.
      norm: "batch" or "frozen", of the trident blocks.
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 80
    level: str = "C4"
    depth: int = 22
    bottleneck: bool = True
    dilations: tuple[int, ...] = (1, 2, 3)
    ranges: Ranges = ((0.0, 90.0), (30.0, 160.0), (90.0, math.inf))
    fast: bool = False
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposal_width: int = 512
    candidates: tuple[int, int] = (12000, 6000)
    proposals: tuple[int, int] = (500, 300)
    proposal_samples: int = 256
    region_size: int = 7
    head: nn.Module = StageHead(stride=1)
    region_samples: int = 128
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100
    norm: str = "frozen"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, in the order of figure 2."""
        self._check()
        self.trident = TridentStage(self.depth, self.bottleneck, self.norm, self.dtype)
        self.region_proposals = RegionProposals(
            strides=(self.backbone.feature_strides[self.level],),
            anchor_sizes=(self.anchor_sizes,),
            anchor_ratios=self.anchor_ratios,
            width=self.proposal_width,
            candidates=self.candidates,
            count=self.proposals,
            samples=self.proposal_samples,
            dtype=self.dtype,
        )
        # Deviations of Girshick 2015, section 3.1.
        normal = nn.initializers.normal
        self.classify = Linear(self.num_classes + 1, kernel_init=normal(0.01), dtype=self.dtype)
        self.refine = Linear(4, kernel_init=normal(0.001), dtype=self.dtype)

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> tuple[Proposals, Float[Array, "G N K"], Float[Array, "G N 1 4"]]:
        """The proposals of the branches, one after the other, their logits and deltas."""
        dilations = self._dilations(train)
        sizes = stack_branches(image_sizes({"image": images}), len(dilations))
        x = self.branch_map(images, dilations, train=train)
        _, proposals = self.propose(x, sizes, train=train)
        return proposals, *self.score_regions(x, proposals.boxes, train=train)

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Those of the proposals and of the head, means over the branches."""
        boxes, labels, sizes, *marks = (
            stack_branches(each, len(self.dilations))
            for each in (batch["boxes"], batch["box_labels"], image_sizes(batch), *objects(batch))
        )
        there, ignored = marks
        own = in_range(boxes, self.ranges)
        x = self.branch_map(batch["image"], self.dilations, train=True)
        scored, proposals = self.propose(x, sizes, train=True)
        key = self.make_rng("sample")
        terms = self.region_proposals.losses(
            scored, boxes, there & own, ignored | (there & ~own), key
        )
        near = in_range(proposals.boxes, self.ranges)
        proposals = proposals._replace(valid=proposals.valid & near)
        labels = jnp.where(own, labels, -2)
        targets = roi_targets(proposals, boxes, labels, there, ignored)
        targets = sample_targets(self.make_rng("sample"), targets, self.region_samples, 0.5)
        return terms | roi_losses(*self.score_regions(x, targets.rois, train=True), targets)

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """The boxes of all branches joined, each of its scale; see `Detector.detect`."""
        dilations = self._dilations(train=False)
        sizes = stack_branches(image_sizes, len(dilations))
        x = self.branch_map(images, dilations, train=False)
        _, proposals = self.propose(x, sizes, train=False)
        said = self.score_regions(x, proposals.boxes, train=False)
        boxes, scores = roi_boxes(proposals, *said, sizes)
        if not self.fast:
            scores = jnp.where(in_range(boxes, self.ranges), scores, 0)
        return best_detections(
            *(join_branches(each, len(dilations)) for each in (boxes, scores)),
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
        )

    def _dilations(self, train: bool) -> tuple[int, ...]:
        """Of the branches that take part."""
        middle = self.dilations[len(self.dilations) // 2]
        return (middle,) if self.fast and not train else self.dilations

    def branch_map(
        self, images: Float[Array, "B Y X C"], dilations: tuple[int, ...], *, train: bool
    ) -> Float[Array, "G V U D"]:
        """What branches of these dilations see, one after the other."""
        x = self.backbone.features(images, train=train)[self.level]
        return self.trident(x.astype(self.dtype), dilations, train=train)

    def propose(
        self, x: Float[Array, "G V U D"], sizes: Float[Array, "G 2"], *, train: bool
    ) -> tuple[AnchorScores, Proposals]:
        """The first stage on the maps of the branches, of images of these sizes."""
        scored = self.region_proposals([x])
        return scored, self.region_proposals.proposals(scored, sizes, train=train)

    def score_regions(
        self, x: Float[Array, "G V U D"], rois: Float[Array, "G N 4"], *, train: bool
    ) -> tuple[Float[Array, "G N K"], Float[Array, "G N 1 4"]]:
        """The second stage: logits and deltas of RoIs."""
        stride = self.backbone.feature_strides[self.level]
        pooled = roi_align(x, rois, self.region_size, stride=stride)
        hidden = self.head(pooled.reshape(-1, *pooled.shape[2:]), train=train)
        hidden = hidden.reshape(*rois.shape[:2], -1)
        return self.classify(hidden), self.refine(hidden)[:, :, None]

    def _check(self) -> None:
        known = self.backbone.feature_strides
        if self.level not in known:
            raise ValueError(f"TridentNet: level={self.level!r} is none of the backbone's {known}")
        if len(self.dilations) != len(self.ranges):
            raise ValueError(
                f"TridentNet: dilations={self.dilations} and ranges={self.ranges} must be equally "
                f"many, one for each branch"
            )


def stack_branches(x: Shaped[Array, "B *N"], count: int) -> Shaped[Array, "G *N"]:
    """Repeats a batch for each branch, G = count B, branch after branch."""
    return jnp.concatenate([x] * count)


def join_branches(x: Shaped[Array, "G R *N"], count: int) -> Shaped[Array, "B Q *N"]:
    """Puts what the branches found in an image, Q = count R, behind each other."""
    parts = jnp.split(x, count)
    return jnp.concatenate(parts, axis=1)


def in_range(
    boxes: Float[Array, "G *N 4"], ranges: tuple[tuple[float | int, float | int], ...]
) -> Bool[Array, "G *N"]:
    """Which boxes are of the scale of their branch.

    low <= sqrt(width height) <= high

    Args:
      boxes: of all branches, one after the other.
      ranges: low and high of each branch, in pixels.

    Source: Li et al. 2019, equation 1 (arXiv:1901.01892).
    """
    sides = jnp.sqrt(box_area(boxes))
    limits = jnp.repeat(jnp.array(ranges, jnp.float32), len(boxes) // len(ranges), axis=0)
    low, high = (jnp.expand_dims(limit, range(1, sides.ndim)) for limit in limits.T)
    return (sides >= low) & (sides <= high)


@register_model
def tridentnet_resnet101(**overrides) -> TridentNet:
    """TridentNet on ResNet-101 up to its conv4, for the 80 classes of COCO."""
    backbone = resnet101(depths=(3, 4, 1), widths=(256, 512, 1024), num_classes=0, norm="frozen")
    return TridentNet(**{"backbone": backbone, **overrides})
