"""R-FCN: maps that know the parts of objects, pooled and averaged, with no layer after.

Paper    Dai et al. 2016, "R-FCN: Object Detection via Region-based Fully Convolutional
         Networks" (arXiv:1605.06409): section 2 and figures 1 to 3, class-agnostic boxes
         (section 2, "position-sensitive RoI pooling") and online hard example mining.
         Dai et al. 2017, "Deformable Convolutional Networks" (arXiv:1703.06211), sections
         2.2 and 4.2: the variant with deformable convolutions and pooling.
Differs  Both parts train together in one step, with proposals as constants, and not in
         turns. Deformable pooling moves a bin alike for all classes. Smooth L1 has its
         corner at 1/9, as that of `RegionProposals`.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.convolution import Conv
from jaxmodels.models.detection.detector import Batch, Detector, image_sizes, objects
from jaxmodels.models.detection.region_proposals import AnchorScores, Proposals, RegionProposals
from jaxmodels.models.detection.roi_heads import roi_detections, roi_losses, roi_targets
from jaxmodels.models.vision.residual_variants import DeformableResNet
from jaxmodels.models.vision.resnet import resnet101
from jaxmodels.ops.deformable_roi import deformable_ps_roi_pool
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.position_sensitive import ps_roi_align, ps_roi_pool
from jaxmodels.registry import register_model

_POOLINGS = ("mean", "align", "deformable")


class PositionSensitiveVote(nn.Module):
    """Maps of k^2 parts, of which each bin of a RoI reads its own, and their mean.

    out[n, f] = 1 / k^2 sum_(i, j) mean of map (i, j, f) over bin (i, j) of RoI n

    "mean" is over the cells that a bin rounds to, as published; "align" over bilinear
    samples, which RoIs of few cells need; "deformable" likewise, and k^2 other maps,
    pooled by "mean", say how far each bin is moved, as shares of the RoI's size (zero at
    first).

    Attributes:
      features: F values a RoI.
      grid: k, bins along a side.
      stride: of the maps.
      pooling: "mean", "align" or "deformable".
      dtype: of the maps; parameters are float32.

    Source: Dai et al. 2016, equations 1 and 2; Li et al. 2017, "Light-Head R-CNN",
    section 3.2 (arXiv:1711.07264); Dai et al. 2017, section 2.2 and figure 4.
    """

    features: int
    grid: int
    stride: int
    pooling: str = "mean"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Y X C"], rois: Float[Array, "B N 4"]
    ) -> Float[Array, "B N F"]:
        """Returns the votes for RoIs in pixels."""
        parts, size = self.grid**2, (self.grid, self.grid)
        # The published deviation of new layers.
        init = nn.initializers.normal(0.01)
        maps = Conv(parts * self.features, 1, kernel_init=init, dtype=self.dtype, name="maps")(x)
        if self.pooling == "mean":
            pooled = ps_roi_pool(maps, rois, size, stride=self.stride)
        elif self.pooling == "align":
            pooled = ps_roi_align(maps, rois, size, stride=self.stride)
        else:
            zeros = nn.initializers.zeros
            moves = Conv(2 * parts, 1, kernel_init=zeros, dtype=self.dtype, name="moves")(x)
            offsets = ps_roi_pool(moves.astype(jnp.float32), rois, size, stride=self.stride)
            pooled = deformable_ps_roi_pool(maps, rois, offsets, size, stride=self.stride)
        return pooled.mean(axis=(2, 3))


class RFCN(Detector):
    """Proposals on one map of a backbone, position-sensitive maps on another.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: without the background.
      proposal_map: the backbone's map with anchors.
      anchor_sizes: square roots of their areas.
      anchor_ratios: heights over widths.
      proposal_width: channels of the proposals' network.
      candidates, proposals: of training and of inference, `candidates` and `count` of
        `RegionProposals`.
      proposal_samples: anchors of an image in the loss.
      region_map: the backbone's map that RoIs are pooled from.
      width: channels that it is reduced to.
      grid: k, bins along the side of a RoI.
      num_hardest: RoIs of an image to learn from, those of the largest loss.
      pooling: "mean", "align" or "deformable", see `PositionSensitiveVote`.
      score_threshold, iou_threshold, max_detections: of what `detect` returns.
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 80
    proposal_map: str = "C4"
    anchor_sizes: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposal_width: int = 512
    candidates: tuple[int, int] = (12000, 6000)
    proposals: tuple[int, int] = (2000, 300)
    proposal_samples: int = 256
    region_map: str = "C5"
    width: int = 1024
    grid: int = 7
    num_hardest: int = 128
    pooling: str = "mean"
    score_threshold: float = 0.05
    iou_threshold: float = 0.3
    max_detections: int = 100
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, in the order of figure 2."""
        self._check()
        strides = self.backbone.feature_strides
        self.region_proposals = RegionProposals(
            strides=(strides[self.proposal_map],),
            anchor_sizes=(self.anchor_sizes,),
            anchor_ratios=self.anchor_ratios,
            width=self.proposal_width,
            candidates=self.candidates,
            count=self.proposals,
            samples=self.proposal_samples,
            dtype=self.dtype,
        )
        self.reduce = Conv(self.width, 1, dtype=self.dtype)
        options = {"grid": self.grid, "stride": strides[self.region_map], "dtype": self.dtype}
        options["pooling"] = self.pooling
        self.classes = PositionSensitiveVote(self.num_classes + 1, **options)
        self.boxes = PositionSensitiveVote(4, **options)

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> tuple[Proposals, Float[Array, "B N K"], Float[Array, "B N 1 4"]]:
        """The proposals of images without padding, their logits and their deltas."""
        maps = self.backbone.features(images, train=train)
        _, proposals = self.propose(maps, image_sizes({"image": images}), train=train)
        return proposals, *self.score_regions(maps, proposals.boxes)

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Those of the proposals, and those of the hardest RoIs among all proposals."""
        there, ignored = objects(batch)
        maps = self.backbone.features(batch["image"], train=True)
        scored, proposals = self.propose(maps, image_sizes(batch), train=True)
        terms = self.region_proposals.losses(
            scored, batch["boxes"], there, ignored, self.make_rng("sample")
        )
        targets = roi_targets(proposals, batch["boxes"], batch["box_labels"], there, ignored)
        logits, deltas = self.score_regions(maps, targets.rois)
        return terms | roi_losses(logits, deltas, targets, num_hardest=self.num_hardest)

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """The boxes of all classes; see `Detector.detect`."""
        maps = self.backbone.features(images)
        _, proposals = self.propose(maps, image_sizes, train=False)
        return roi_detections(
            proposals,
            *self.score_regions(maps, proposals.boxes),
            image_sizes,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
        )

    def propose(
        self, maps: Mapping[str, Array], sizes: Float[Array, "B 2"], *, train: bool
    ) -> tuple[AnchorScores, Proposals]:
        """The first stage on a backbone's maps, of images of these sizes."""
        scored = self.region_proposals([maps[self.proposal_map].astype(self.dtype)])
        return scored, self.region_proposals.proposals(scored, sizes, train=train)

    def score_regions(
        self, maps: Mapping[str, Array], rois: Float[Array, "B N 4"]
    ) -> tuple[Float[Array, "B N K"], Float[Array, "B N 1 4"]]:
        """The second stage: logits and deltas of RoIs."""
        x = nn.relu(self.reduce(maps[self.region_map].astype(self.dtype)))
        return self.classes(x, rois), self.boxes(x, rois)[:, :, None]

    def _check(self) -> None:
        if self.pooling not in _POOLINGS:
            raise ValueError(f"RFCN: pooling={self.pooling!r} is none of {list(_POOLINGS)}")
        known = self.backbone.feature_strides
        for field in ("proposal_map", "region_map"):
            if (name := getattr(self, field)) not in known:
                raise ValueError(f"RFCN: {field}={name!r} is none of the backbone's {known}")


@register_model
def r_fcn_resnet101(**overrides) -> RFCN:
    """R-FCN on ResNet-101 whose last stage is dilated, for the 80 classes of COCO."""
    backbone = resnet101(num_classes=0, output_stride=16, norm="frozen")
    return RFCN(**{"backbone": backbone, **overrides})


@register_model
def r_fcn_resnet101_deformable(**overrides) -> RFCN:
    """R-FCN with deformable convolutions in the last stage and deformable pooling."""
    backbone = DeformableResNet(
        depths=(3, 4, 23, 3), num_classes=0, output_stride=16, norm="frozen"
    )
    return RFCN(**{"backbone": backbone, "pooling": "deformable", **overrides})
