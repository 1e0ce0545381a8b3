"""U-Net: down to context, up to places, with a bridge on every level.

Paper    Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image
         Segmentation" (arXiv:1505.04597): section 2 and figure 1.
Differs  Convolutions are padded, so that the output has the size of the input and
         nothing is cropped from the bridges; sides that 2^depth does not divide are
         continued below and on the right and cut back. Batch norm instead of biases
         and of the dropout at the bottom (norm=None has biases). Besides
         the paper's up-convolution there are other ways up.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.convolution import Conv, ConvTranspose
from jaxmodels.layers.upsample import Upsample
from jaxmodels.models.vision.checks import require_images
from jaxmodels.ops.pooling import max_pool, max_unpool
from jaxmodels.registry import register_model


class DoubleConv(nn.Module):
    """Two 3 x 3 convolutions, each with norm and ReLU.

    Attributes:
      features: channels of both.
      norm: "batch", "frozen" or None.
      dtype: of the computation.
    """

    features: int
    norm: str | None = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X F"]:
        """Returns a map of the same size."""
        for i in range(2):
            conv = ConvNorm(self.features, 3, norm=self.norm, dtype=self.dtype, name=f"conv_{i}")
            x = conv(x, train=train)
        return x


class UpConv(nn.Module):
    """Twice the size and half the channels.

    Attributes:
      upsampling: as of `UNet`.
      dtype: of the computation.
    """

    upsampling: str = "transposed"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], places: Array | None) -> Float[Array, "B V U F"]:
        """Enlarges a map.

        Args:
          x: the map below.
          places: of the maxima that became it, for "max_unpool".
        """
        features, size = x.shape[-1] // 2, (2 * x.shape[1], 2 * x.shape[2])
        if self.upsampling == "transposed":
            return ConvTranspose(features, 2, stride=2, dtype=self.dtype, name="up")(x)
        # On the small map: a 1 x 1 convolution costs a quarter there.
        x = Conv(features, 1, dtype=self.dtype, name="halve")(x)
        if self.upsampling == "max_unpool":
            return max_unpool(x, places, size)
        return Upsample(2, self.upsampling, dtype=self.dtype, name="up")(x, size)


class UNet(nn.Module):
    """A U of double convolutions with bridges.

    Attributes:
      num_classes: logits of each pixel.
      in_channels: of the images.
      width: channels of the first level; each level down has twice as many.
      depth: number of levels below the first.
      upsampling: "transposed" (the paper's 2 x 2 up-convolution), "nearest",
        "bilinear", "pixel_shuffle" or "max_unpool", which puts values back where
        the maxima stood.
      norm: "batch", "frozen", or None for biases as published.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int = 2
    in_channels: int = 3
    width: int = 64
    depth: int = 4
    upsampling: str = "transposed"
    norm: str | None = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B Y X K"]:
        """Classifies every pixel.

        Args:
          images: of any size.
          train: normalises by the batch; updates the collection "batch_stats",
            which must then be mutable.

        Returns:
          Logits of the images' size, in `dtype`.

        Raises:
          ValueError: the images do not have `in_channels`, or no such upsampling.
        """
        require_images("UNet", images, self.in_channels, 1)
        rows, columns = images.shape[1:3]
        x, bridges = self._continued(images.astype(self.dtype)), []
        for level in range(self.depth):
            x = self._block(level, "down")(x, train=train)
            unpool = self.upsampling == "max_unpool"
            pooled, places = (
                max_pool(x, 2, return_indices=True) if unpool else (max_pool(x, 2), None)
            )
            bridges.append((x, places))
            x = pooled
        x = self._block(self.depth, "down")(x, train=train)
        for level in reversed(range(self.depth)):
            bridge, places = bridges[level]
            x = UpConv(self.upsampling, dtype=self.dtype, name=f"rise_{level}")(x, places)
            x = self._block(level, "up")(jnp.concatenate([bridge, x], axis=-1), train=train)
        x = Conv(self.num_classes, 1, dtype=self.dtype, name="classify")(x)
        return x[:, :rows, :columns]

    def _block(self, level: int, side: str) -> DoubleConv:
        width = self.width * 2**level
        return DoubleConv(width, norm=self.norm, dtype=self.dtype, name=f"{side}_{level}")

    def _continued(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U C"]:
        """Repeats the last row and column up to a multiple of 2^depth; zeros would draw an edge."""
        below, right = (-n % 2**self.depth for n in x.shape[1:3])
        return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)), mode="edge")


@register_model
def unet(**overrides) -> UNet:
    """U-Net of the published width and depth, for two classes."""
    return UNet(**overrides)
