"""Faster R-CNN: proposals from a network, and a box branch that classifies and refines them.

Paper    Ren et al. 2015, "Faster R-CNN" (arXiv:1506.01497): the proposals of section
         3.1 and the box branch of Girshick 2015, "Fast R-CNN" (arXiv:1504.08083), on
         shared maps. Lin et al. 2017, "Feature Pyramid Networks" (arXiv:1612.03144),
         section 4: one size of anchor a map, regions from the map of their size, a
         two-layer head. He et al. 2016 (arXiv:1512.03385), appendix A: the last stage
         of a ResNet as the head ("C4").
Differs  Both stages train together, in one step, with proposals as constants ("approximate
         joint training"). Defaults are those of torchvision: two samples a bin and side
         without the half-pixel shift, thresholds, smooth L1 with its corner at 1/9.
Weights  torchvision's `fasterrcnn_resnet50_fpn`, both ways, by
         `jaxmodels.weights.load_torchvision_detector` and `save_torchvision_detector`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.linear import Linear
from jaxmodels.models.detection.detector import Batch, Detector, image_sizes, objects
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.detection.region_proposals import AnchorScores, Proposals, RegionProposals
from jaxmodels.models.detection.roi_heads import (
    roi_detections,
    roi_losses,
    roi_targets,
    sample_targets,
)
from jaxmodels.models.vision.resnet import ResidualBlock, ResNet, resnet50
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.pyramid_roi_align import CANONICAL_SIZE, pyramid_roi_align
from jaxmodels.ops.roi_pool import roi_max_pool
from jaxmodels.registry import register_model

# Most of the regions that are sampled to learn from that hold objects (Girshick 2015, section 2.3).
_POSITIVE_SHARE = 0.25


class TwoLayerHead(nn.Module):
    """Two dense layers on all values of a region (Lin et al. 2017, section 4.2).

    Attributes:
      width: of both layers.
      dtype: of the computation; parameters are float32.
    """

    width: int = 1024
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N PY PX C"], *, train: bool = False) -> Float[Array, "N F"]:
        """Returns one vector a region."""
        del train
        x = x.reshape(len(x), -1)
        for name in ("hidden_1", "hidden_2"):
            layer = Linear(
                self.width, kernel_init=nn.initializers.he_normal(), dtype=self.dtype, name=name
            )
            x = nn.relu(layer(x))
        return x


class StageHead(nn.Module):
    """The last stage of a ResNet and its mean (He et al. 2016, appendix A).

    Attributes:
      features, depth, stride: of the stage.
      bottleneck, norm, dtype: of its blocks, see `ResidualBlock`.
    """

    features: int = 2048
    depth: int = 3
    stride: int = 2
    bottleneck: bool = True
    norm: str = "frozen"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N PY PX C"], *, train: bool = False) -> Float[Array, "N F"]:
        """Returns one vector a region."""
        for i in range(self.depth):
            block = ResidualBlock(
                self.features,
                self.bottleneck,
                project=i == 0,
                stride=1 if i else self.stride,
                norm=self.norm,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            x = block(x, train=train)
        return x.mean(axis=(1, 2))


class RegionScores(NamedTuple):
    """What the box branch says of every region.

    Attributes:
      logits: of the background and of all classes.
      deltas: of each of them, in the units of `roi_heads.ROI_WEIGHTS`.
    """

    logits: Float[Array, "B N K"]
    deltas: Float[Array, "B N K 4"]


class FasterRCNN(Detector):
    """Proposals and box branch on any backbone.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: without the background.
      proposal_maps: the backbone's maps with anchors.
      anchor_sizes: for each of them.
      anchor_ratios: heights over widths.
      proposal_width: channels of the proposals' network; None is those of the maps.
      candidates, proposals: of training and of inference, `candidates` and `count` of
        `RegionProposals`.
      proposal_samples: anchors of an image in the loss.
      region_maps: the backbone's maps that regions are pooled from, finest first.
      canonical_size: side of the regions that are pooled from the map of stride 16.
      region_size: of what is pooled, values a side.
      pooling: "align", or "max", RoI pooling as in the paper, which takes one map.
      head: from pooled regions (N, PY, PX, C) to vectors (N, F).
      region_samples: proposals of an image that the box branch learns from.
      score_threshold, iou_threshold, max_detections: of what `detect` returns.
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int
    proposal_maps: tuple[str, ...] = ("P2", "P3", "P4", "P5", "P6")
    anchor_sizes: tuple[tuple[float | int, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    anchor_ratios: tuple[float | int, ...] = (0.5, 1.0, 2.0)
    proposal_width: int | None = None
    candidates: tuple[int, int] = (2000, 1000)
    proposals: tuple[int, int] = (2000, 1000)
    proposal_samples: int = 256
    region_maps: tuple[str, ...] = ("P2", "P3", "P4", "P5")
    canonical_size: float | int = CANONICAL_SIZE
    region_size: int = 7
    pooling: str = "align"
    head: nn.Module = TwoLayerHead()
    region_samples: int = 512
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The three parts, in the order of figure 2."""
        self._check()
        strides = self.backbone.feature_strides
        self.region_proposals = RegionProposals(
            strides=tuple(strides[name] for name in self.proposal_maps),
            anchor_sizes=self.anchor_sizes,
            anchor_ratios=self.anchor_ratios,
            width=self.proposal_width,
            candidates=self.candidates,
            count=self.proposals,
            samples=self.proposal_samples,
            dtype=self.dtype,
        )
        # Deviations of Girshick 2015, section 3.1.
        normal = nn.initializers.normal
        classes = self.num_classes + 1
        self.classify = Linear(classes, kernel_init=normal(0.01), dtype=self.dtype)
        self.refine = Linear(4 * classes, kernel_init=normal(0.001), dtype=self.dtype)

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> tuple[Proposals, RegionScores]:
        """The proposals of images without padding, and what the box branch says of them.

        Args:
          images: of any size that the backbone takes.
          train: passed to the backbone; and takes as many proposals as in training.

        Raises:
          ValueError: fields contradict each other, or the backbone does not take the images.
        """
        maps = self.backbone.features(images, train=train)
        scored = self.score_anchors(maps)
        sizes = image_sizes({"image": images})
        proposals = self.region_proposals.proposals(scored, sizes, train=train)
        return proposals, self.score_regions(maps, proposals.boxes, train=train)

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The two terms of each stage, see `RegionProposals.losses` and `roi_losses`."""
        there, ignored = objects(batch)
        boxes, labels = batch["boxes"], batch["box_labels"]
        maps = self.backbone.features(batch["image"], train=True)
        scored = self.score_anchors(maps)
        proposals = self.region_proposals.proposals(scored, image_sizes(batch), train=True)
        first, second = jax.random.split(self.make_rng("sample"))
        targets = roi_targets(proposals, boxes, labels, there, ignored)
        targets = sample_targets(second, targets, self.region_samples, _POSITIVE_SHARE)
        return {
            **self.region_proposals.losses(scored, boxes, there, ignored, first),
            **roi_losses(*self.score_regions(maps, targets.rois, train=True), targets),
        }

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """The best boxes of all classes after suppression within each of them."""
        maps = self.backbone.features(images, train=False)
        scored = self.score_anchors(maps)
        proposals = self.region_proposals.proposals(scored, image_sizes, train=False)
        return roi_detections(
            proposals,
            *self.score_regions(maps, proposals.boxes, train=False),
            image_sizes,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
        )

    def score_anchors(self, maps: Mapping[str, Array]) -> AnchorScores:
        """The first stage on a backbone's maps."""
        return self.region_proposals([maps[name] for name in self.proposal_maps])

    def score_regions(
        self, maps: Mapping[str, Array], boxes: Float[Array, "B N 4"], *, train: bool
    ) -> RegionScores:
        """The second stage on a backbone's maps."""
        pooled = self._pool([maps[name] for name in self.region_maps], boxes)
        hidden = self.head(pooled.reshape(-1, *pooled.shape[2:]), train=train)
        logits = self.classify(hidden).astype(jnp.float32)
        deltas = self.refine(hidden).astype(jnp.float32)
        return RegionScores(
            logits.reshape(*boxes.shape[:2], -1), deltas.reshape(*boxes.shape[:2], -1, 4)
        )

    def _pool(self, maps: list[Array], boxes: Array) -> Float[Array, "B N PY PX C"]:
        strides = [self.backbone.feature_strides[name] for name in self.region_maps]
        if self.pooling == "max":
            return roi_max_pool(maps[0], boxes, self.region_size, stride=strides[0])
        return pyramid_roi_align(
            maps,
            boxes,
            self.region_size,
            strides=strides,
            canonical_size=self.canonical_size,
            aligned=False,
        )

    def _check(self) -> None:
        known = self.backbone.feature_strides
        for field in ("proposal_maps", "region_maps"):
            if missing := [name for name in getattr(self, field) if name not in known]:
                raise ValueError(
                    f"FasterRCNN: {field} {missing} are none of the backbone's {known}"
                )
        if self.pooling not in ("align", "max"):
            raise ValueError(f"FasterRCNN: pooling={self.pooling!r} is neither 'align' nor 'max'")
        if self.pooling == "max" and len(self.region_maps) > 1:
            raise ValueError(
                f"FasterRCNN: pooling='max' takes one map, not region_maps={self.region_maps}; "
                f"pass 'align'"
            )


@register_model
def faster_rcnn_resnet50_fpn(**overrides) -> FasterRCNN:
    """Faster R-CNN on the pyramid of a ResNet-50, for COCO's 90 ids, as torchvision has it."""
    backbone = FeaturePyramid(resnet50(num_classes=0, norm="frozen"))
    return FasterRCNN(**{"backbone": backbone, "num_classes": 90, **overrides})


@register_model
def faster_rcnn_resnet50_c4(**overrides) -> FasterRCNN:
    """Faster R-CNN on stage 4 of a ResNet-50 with stage 5 as its head, for COCO's 80 classes."""
    stages = {"depths": (3, 4, 6), "widths": (256, 512, 1024), "norm": "frozen"}
    published = {
        "backbone": ResNet(**stages, num_classes=0),
        "num_classes": 80,
        "proposal_maps": ("C4",),
        "anchor_sizes": ((32, 64, 128, 256, 512),),
        "proposal_width": 512,
        "candidates": (12000, 6000),
        "proposals": (2000, 300),
        "region_maps": ("C4",),
        "region_size": 14,
        "head": StageHead(),
    }
    return FasterRCNN(**{**published, **overrides})
