"""Convolution, norm and activation: the unit that convolutional networks are built of."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.normalization import batch_norm
from jaxmodels.ops.windows import Pair


class ConvNorm(nn.Module):
    """A convolution that keeps the size over its stride, batch norm, and an activation.

    Attributes:
      features: channels of the output.
      kernel_size: one value or (y, x).
      stride: one value or (y, x).
      dilation: one value or (y, x).
      groups: that see only their own channels.
      norm: "batch", "frozen", or None for a bias instead.
      activation: applied last; None is none.
      kernel_init: of the convolution.
      scale_init: of the norm's scale.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: Pair
    stride: Pair = 1
    dilation: Pair = 1
    groups: int = 1
    norm: str | None = "batch"
    activation: Callable | None = nn.relu
    kernel_init: Initializer = nn.initializers.he_normal()
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels; raises ValueError as `Conv`."""
        x = Conv(
            self.features,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            use_bias=self.norm is None,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        if self.norm is not None:
            x = batch_norm(self.norm, train, self.dtype, "norm", scale_init=self.scale_init)(x)
        return x if self.activation is None else self.activation(x)


class SeparableConvNorm(nn.Module):
    """A depthwise `ConvNorm` and one of 1 x 1: k^2 + F multiplications a value, not k^2 F.

    Attributes: as of `ConvNorm`, without groups.

    Source: Chollet 2017, "Xception", section 2 (arXiv:1610.02357); norm and
    activation after both as in Chen et al. 2018, section 3.2 (arXiv:1802.02611).
    """

    features: int
    kernel_size: Pair
    dilation: Pair = 1
    norm: str | None = "batch"
    activation: Callable = nn.relu
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X F"]:
        """Returns images of `features` channels; raises ValueError as `Conv`."""
        options = {"norm": self.norm, "activation": self.activation, "dtype": self.dtype}
        channels = x.shape[-1]
        x = ConvNorm(
            channels,
            self.kernel_size,
            dilation=self.dilation,
            groups=channels,
            **options,
            name="depthwise",
        )(x, train=train)
        return ConvNorm(self.features, 1, **options, name="pointwise")(x, train=train)
