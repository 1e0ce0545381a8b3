"""FCN: a classifier of every pixel, on any backbone.

Paper    Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation"
         (arXiv:1411.4038): the skip architecture of section 4.2 and figure 3, with
         FCN-32s, 16s and 8s by the field `stride`.
Differs  Backbones are those of this library and not VGG, so nothing is added around
         the image, and maps are cut to size on the right and below. Upsampling is
         transposed convolution, which starts as bilinear, or another method. The
         last one, back to the image, is learned as well where the paper keeps it
         bilinear.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.upsample import Upsample
from jaxmodels.models.vision.resnet import resnet50, resnet101
from jaxmodels.registry import register_model


class FCN(nn.Module):
    """Scores of each map of a backbone, added from the coarsest to the finest.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      num_classes: logits of each pixel.
      stride: of the finest map that is scored: 32 for FCN-32s, which knows the last
        map alone, 16 or 8.
      upsampling: "transposed", "bilinear", "nearest" or "pixel_shuffle".
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    num_classes: int = 21
    stride: int = 8
    upsampling: str = "transposed"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B Y X K"]:
        """Classifies every pixel.

        Args:
          images: of any size that the backbone takes.
          train: passed to the backbone, whose "batch_stats" must then be mutable.

        Returns:
          Logits of the images' size, in `dtype`.

        Raises:
          ValueError: the backbone has no map of the stride or a larger one, or
            does not take the images.
        """
        strides = self._strides()
        maps = self.backbone.features(images, train=train)
        scores, before = None, None
        for name in reversed(strides):
            scored = self._score(name)(maps[name].astype(self.dtype))
            if scores is not None:
                up = self._upsample(before // strides[name], f"upsample_{name}")
                scored = scored + up(scores, scored.shape[1:3])
            scores, before = scored, strides[name]
        return self._upsample(before, "upsample")(scores, images.shape[1:3])

    def _score(self, name: str) -> Conv:
        """Starts at zero, as the paper's (section 4.3): all classes are equally likely."""
        zeros = nn.initializers.zeros
        return Conv(self.num_classes, 1, kernel_init=zeros, dtype=self.dtype, name=f"score_{name}")

    def _upsample(self, factor: int, name: str) -> Upsample:
        return Upsample(factor, self.upsampling, dtype=self.dtype, name=name)

    def _strides(self) -> dict[str, int]:
        known = self.backbone.feature_strides
        strides = {name: stride for name, stride in known.items() if stride >= self.stride}
        if not strides:
            raise ValueError(
                f"FCN: stride={self.stride} is larger than that of every map of the backbone: "
                f"{known}"
            )
        return strides


@register_model
def fcn_resnet50(**overrides) -> FCN:
    """FCN-8s on ResNet-50 for the 21 classes of Pascal VOC."""
    return FCN(**{"backbone": resnet50(num_classes=0), **overrides})


@register_model
def fcn_resnet101(**overrides) -> FCN:
    """FCN-8s on ResNet-101 for the 21 classes of Pascal VOC."""
    return FCN(**{"backbone": resnet101(num_classes=0), **overrides})
