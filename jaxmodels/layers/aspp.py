"""Atrous spatial pyramid pooling: one map seen at several rates."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm, SeparableConvNorm


class ASPP(nn.Module):
    """A 1 x 1 and three dilated 3 x 3 convolutions and the mean of the map, side by side.

    out = project(concat(conv_1x1(x), conv_3x3(x; r) for r in rates, conv_1x1(mean(x))))

    Attributes:
      features: channels of each branch and of the output.
      rates: dilations where the map has stride 16.
      output_stride: of the map; the dilations are rates * 16 / output_stride, which
        cover the same part of the image.
      separable: makes the 3 x 3 convolutions depthwise separable (DeepLab v3+).
      norm: "batch" or "frozen".
      dtype: of the computation; parameters are float32.

    Source: Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image
    Segmentation", section 3.3 and figure 5 (arXiv:1706.05587).
    """

    features: int = 256
    rates: tuple[int, ...] = (6, 12, 18)
    output_stride: int = 16
    separable: bool = False
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B Y X F"]:
        """Returns a map of `features` channels.

        Args:
          x: the last map of a backbone.
          train: normalises by the batch; updates the collection "batch_stats".

        Raises:
          ValueError: a rate is no whole number at this output stride.
        """
        options = {"norm": self.norm, "dtype": self.dtype}
        wide = SeparableConvNorm if self.separable else ConvNorm
        branches = [ConvNorm(self.features, 1, **options, name="point")(x, train=train)]
        for i, rate in enumerate(self._dilations()):
            branch = wide(self.features, 3, dilation=rate, **options, name=f"atrous_{i}")
            branches.append(branch(x, train=train))
        mean = x.mean(axis=(1, 2), keepdims=True)
        mean = ConvNorm(self.features, 1, **options, name="image")(mean, train=train)
        branches.append(jnp.broadcast_to(mean, branches[0].shape))
        x = jnp.concatenate(branches, axis=-1)
        return ConvNorm(self.features, 1, **options, name="project")(x, train=train)

    def _dilations(self) -> list[int]:
        if any(rate * 16 % self.output_stride for rate in self.rates):
            raise ValueError(
                f"ASPP: rates={self.rates}, which are for stride 16, are no whole numbers of "
                f"pixels at output_stride={self.output_stride}"
            )
        return [rate * 16 // self.output_stride for rate in self.rates]
