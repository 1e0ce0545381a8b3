"""DeepLab v3 and v3+: dilated backbone, pyramid of rates, and a small decoder.

Papers   Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image
         Segmentation" (arXiv:1706.05587): section 3.3, the parallel modules with
         image pooling. Chen et al. 2018, "Encoder-Decoder with Atrous Separable
         Convolution" (arXiv:1802.02611): the decoder of section 3.1 and figure 2.
Differs  No cascade of blocks and no multi-grid; the backbone is any with
         `features`, ResNet-50 by name.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.aspp import ASPP
from jaxmodels.layers.conv_norm import ConvNorm, SeparableConvNorm
from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.upsample import Upsample
from jaxmodels.models.vision.resnet import resnet50
from jaxmodels.registry import register_model


class DeepLabV3(nn.Module):
    """ASPP on the last map of a backbone, logits, and upsampling to the image.

    Attributes:
      backbone: any module with `features` and `feature_strides`; its last map
        should have stride 16 or 8.
      num_classes: logits of each pixel.
      features: channels of the ASPP.
      rates: of the ASPP where the last map has stride 16; adapted to other strides.
      separable: makes the ASPP's 3 x 3 convolutions depthwise separable.
      upsampling: "bilinear" (as published), "nearest", "transposed" or
        "pixel_shuffle".
      norm: "batch" or "frozen".
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 21
    features: int = 256
    rates: tuple[int, ...] = (6, 12, 18)
    separable: bool = False
    upsampling: str = "bilinear"
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B Y X K"]:
        """Classifies every pixel.

        Args:
          images: of any size that the backbone takes.
          train: normalises by the batch; updates the collection "batch_stats",
            which must then be mutable.

        Returns:
          Logits of the images' size, in `dtype`.

        Raises:
          ValueError: the rates do not fit the stride, or the backbone does not
            take the images.
        """
        maps = self.backbone.features(images, train=train)
        name, stride = list(self.backbone.feature_strides.items())[-1]
        x = _pyramid(self, stride)(maps[name].astype(self.dtype), train=train)
        x = Conv(self.num_classes, 1, dtype=self.dtype, name="classify")(x)
        upsample = Upsample(stride, self.upsampling, dtype=self.dtype, name="upsample")
        return upsample(x, images.shape[1:3])


class DeepLabV3Plus(nn.Module):
    """ASPP, and a decoder that brings back the edges from an early map.

    Attributes: as of `DeepLabV3`, and
      low_features: channels that are kept of the backbone's first map.
    """

    backbone: nn.Module
    num_classes: int = 21
    features: int = 256
    low_features: int = 48
    rates: tuple[int, ...] = (6, 12, 18)
    separable: bool = True
    upsampling: str = "bilinear"
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B Y X K"]:
        """Classifies every pixel; arguments, result and errors as of `DeepLabV3`."""
        options = {"norm": self.norm, "dtype": self.dtype}
        maps = self.backbone.features(images, train=train)
        (early, fine), *_, (late, coarse) = self.backbone.feature_strides.items()
        low = ConvNorm(self.low_features, 1, **options, name="low")(
            maps[early].astype(self.dtype), train=train
        )
        x = _pyramid(self, coarse)(maps[late].astype(self.dtype), train=train)
        upsample = Upsample(coarse // fine, self.upsampling, dtype=self.dtype, name="upsample_aspp")
        x = jnp.concatenate([upsample(x, low.shape[1:3]), low], axis=-1)
        conv = SeparableConvNorm if self.separable else ConvNorm
        for i in range(2):
            x = conv(self.features, 3, **options, name=f"refine_{i}")(x, train=train)
        x = Conv(self.num_classes, 1, dtype=self.dtype, name="classify")(x)
        upsample = Upsample(fine, self.upsampling, dtype=self.dtype, name="upsample")
        return upsample(x, images.shape[1:3])


def _pyramid(model: DeepLabV3 | DeepLabV3Plus, stride: int) -> ASPP:
    return ASPP(
        model.features,
        rates=model.rates,
        output_stride=stride,
        separable=model.separable,
        norm=model.norm,
        dtype=model.dtype,
        name="aspp",
    )


@register_model
def deeplab_v3_resnet50(**overrides) -> DeepLabV3:
    """DeepLab v3 on ResNet-50 of output stride 16, for the 21 classes of Pascal VOC."""
    return DeepLabV3(**{"backbone": resnet50(num_classes=0, output_stride=16), **overrides})


@register_model
def deeplab_v3_plus_resnet50(**overrides) -> DeepLabV3Plus:
    """DeepLab v3+ on ResNet-50 of output stride 16, for the 21 classes of Pascal VOC."""
    return DeepLabV3Plus(**{"backbone": resnet50(num_classes=0, output_stride=16), **overrides})
