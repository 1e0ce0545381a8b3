"""CenterNet: an object is the point at its centre.

Paper    Zhou et al. 2019, "Objects as Points" (arXiv:1904.07850): sections 3 and 4, and
         the ResNet with three up-convolutions of section 5 and figure 6 (b).
Differs  Sizes are in cells of the map, as in the authors' code, so that the decoding of
         section 4 holds as written. Where boxes are ignored, their class is not taught.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.convolution import ConvTranspose
from jaxmodels.layers.deformable import DeformableConv
from jaxmodels.layers.normalization import batch_norm
from jaxmodels.layers.upsample import bilinear_kernel
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
from jaxmodels.models.vision.resnet import resnet18, resnet101
from jaxmodels.ops.boxes import clip_boxes, cxcywh_to_xyxy, xyxy_to_cxcywh
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.heat_maps import gaussian_radius, splat_gaussians
from jaxmodels.registry import register_model

# Of the sizes' term of the loss, equation 4.
_SIZE_WEIGHT = 0.1


class UpConvolutions(nn.Module):
    """A backbone whose last map is doubled in size, again and again; itself a backbone.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      widths: channels of each doubling: a 3 x 3 convolution and a transposed one of
        4 x 4 that starts as bilinear interpolation, both with norm and ReLU.
      deformable: whether the 3 x 3 convolutions are deformable ones, as published.
      norm: "batch" or "frozen".
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    widths: tuple[int, ...] = (256, 128, 64)
    deformable: bool = True
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in the only map of `features`."""
        *_, last = self.backbone.feature_strides.values()
        return {"up": last // 2 ** len(self.widths)}

    @nn.compact
    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The map by its name, "up"; raises as the backbone does."""
        *_, x = self.backbone.features(images, train=train).values()
        for i, width in enumerate(self.widths):
            x = self._mix(x.astype(self.dtype), width, i, train)
            init = {"kernel_init": bilinear_kernel, "use_bias": False, "dtype": self.dtype}
            x = ConvTranspose(width, 4, stride=2, **init, name=f"up_{i}")(x)
            x = nn.relu(batch_norm(self.norm, train, self.dtype, f"up_norm_{i}")(x))
        return {"up": x}

    def _mix(self, x, width: int, index: int, train: bool):
        """The 3 x 3 convolution before a doubling."""
        name = f"mix_{index}"
        if not self.deformable:
            unit = ConvNorm(width, 3, norm=self.norm, dtype=self.dtype, name=name)
            return unit(x, train=train)
        x = DeformableConv(width, 3, use_bias=False, dtype=self.dtype, name=name)(x)
        return nn.relu(batch_norm(self.norm, train, self.dtype, f"mix_norm_{index}")(x))


class CentreMaps(NamedTuple):
    """What the heads say at every cell of a map.

    Attributes:
      heat: logits of a centre of each class.
      offsets: from the cell's upper left corner to the centre, x and y, in cells.
      sizes: width and height of the object, in cells.
    """

    heat: Float[Array, "B Y X K"]
    offsets: Float[Array, "B Y X 2"]
    sizes: Float[Array, "B Y X 2"]


class CenterNet(Detector):
    """Three heads on the finest map of a backbone, or on each of the finest maps.

    Several maps of one stride, as an hourglass has, are each taught (the mean of their
    losses is taken), and the last one detects.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: K.
      head_width: channels inside the heads.
      max_detections: peaks that become boxes.
      dtype: of the heads; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 80
    head_width: int = 64
    max_detections: int = 100
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> tuple[CentreMaps, ...]:
        """The three heads on each of the finest maps; raises as the backbone does."""
        maps, found = self.backbone.features(images, train=train), []
        head = partial(PointHead, width=self.head_width, dtype=self.dtype)
        for name in finest_maps(self.backbone.feature_strides)[0]:
            heat = head(self.num_classes, bias=HEAT_BIAS, name=f"heat_{name}")
            heads = (heat, head(2, name=f"offsets_{name}"), head(2, name=f"sizes_{name}"))
            found.append(CentreMaps(*(each(maps[name].astype(self.dtype)) for each in heads)))
        return tuple(found)

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The three terms of equation 4, weighted."""
        there, ignored = objects(batch)
        found = self(batch["image"], train=True)
        _, stride = finest_maps(self.backbone.feature_strides)
        one = partial(centre_targets, shape=found[0].heat.shape[1:], stride=stride)
        targets = jax.vmap(one)(batch["boxes"], batch["box_labels"], there, ignored)
        terms = [centre_losses(each, targets) for each in found]
        return jax.tree.map(lambda *losses: sum(losses) / len(losses), *terms)

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """Peaks of the last map, of which each is a box; there is no suppression."""
        *_, found = self(images)
        _, stride = finest_maps(self.backbone.feature_strides)

        def one(heat, offsets, sizes, size):
            scores, classes, cells = best_cells(heat, size, stride, self.max_detections)
            centres, sizes = cells + at_cells(offsets, cells), at_cells(sizes, cells)
            boxes = stride * cxcywh_to_xyxy(jnp.concatenate([centres, sizes], axis=-1))
            boxes = clip_boxes(boxes, size)
            valid = (scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(axis=-1)
            return ranked(boxes, scores, classes, valid, self.max_detections)

        return jax.vmap(one)(*found, image_sizes)


class CentreTargets(NamedTuple):
    """What maps are to learn of the objects of an image.

    Attributes:
      heat: 1 at each object's centre, less around it.
      taught: where the heat is known: not in an ignored box of the class.
      cells: column and row of each object's centre.
      offsets, sizes: at these cells, as of `CentreMaps`.
      there: which objects there are.
    """

    heat: Float[Array, "*B Y X K"]
    taught: Bool[Array, "*B Y X K"]
    cells: Int[Array, "*B N 2"]
    offsets: Float[Array, "*B N 2"]
    sizes: Float[Array, "*B N 2"]
    there: Bool[Array, "*B N"]


def centre_targets(
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    there: Bool[Array, "N"],
    ignored: Bool[Array, "N"],
    *,
    shape: tuple[int, int, int],
    stride: int,
) -> CentreTargets:
    """Gaussians around the centres of an image's objects, and what else to learn there.

    Args:
      boxes, labels: of an image.
      there: which boxes are objects.
      ignored: which boxes are neither objects nor background.
      shape: rows, columns and classes of the map.
      stride: pixels a cell.

    Source: Zhou et al. 2019, section 3 (arXiv:1904.07850).
    """
    boxes_cxcywh = xyxy_to_cxcywh(boxes)
    cells, offsets = cells_of(boxes_cxcywh[:, :2], shape[:2], stride)
    sizes = boxes_cxcywh[:, 2:] / stride
    radii = gaussian_radius(sizes[:, 1], sizes[:, 0])
    heat = splat_gaussians(cells, radii, labels, there, shape)
    taught = taught_cells(shape[:2], stride, boxes, labels, ignored, shape[2])
    return CentreTargets(heat, taught, cells, offsets, sizes, there)


def centre_losses(found: CentreMaps, targets: CentreTargets) -> dict[str, Float[Array, ""]]:
    """The focal loss of the heat, and L1 of offsets and a tenth of that of sizes.

    The last two are |found - true|, x and y added, averaged over the objects.

    Args:
      found: what the heads say.
      targets: of a batch.

    Returns:
      "heat", "offsets" and "sizes".

    Source: Zhou et al. 2019, equations 1 to 4 (arXiv:1904.07850).
    """

    def error(values, wanted):
        apart = jnp.abs(jax.vmap(at_cells)(values, targets.cells) - wanted).sum(axis=-1)
        return mean_over(targets.there, apart)

    return {
        "heat": heat_loss(found.heat, targets.heat, targets.taught),
        "offsets": error(found.offsets, targets.offsets),
        "sizes": _SIZE_WEIGHT * error(found.sizes, targets.sizes),
    }


@register_model
def centernet_resnet18(**overrides) -> CenterNet:
    """CenterNet on ResNet-18 with deformable up-convolutions, for the 80 classes of COCO."""
    return CenterNet(**{"backbone": UpConvolutions(resnet18(num_classes=0)), **overrides})


@register_model
def centernet_resnet101(**overrides) -> CenterNet:
    """CenterNet on ResNet-101 with deformable up-convolutions, for the 80 classes of COCO."""
    return CenterNet(**{"backbone": UpConvolutions(resnet101(num_classes=0)), **overrides})
