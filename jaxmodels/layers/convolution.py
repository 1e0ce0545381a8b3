"""Convolutions with parameters."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.ops.convolution import convolution
from jaxmodels.ops.transposed_convolution import transposed_convolution
from jaxmodels.ops.windows import Padding, Pair, pair


class Conv(nn.Module):
    """A convolution that keeps the size of the image, over its stride, unless told otherwise.

    Attributes:
      features: channels of the output.
      kernel_size: one value or (y, x).
      stride: one value or (y, x).
      padding: as of `ops.convolution`; None is dilation * (kernel_size - 1) // 2
        on both sides, what torch users write.
      dilation: one value or (y, x).
      groups: that see only their own channels.
      use_bias: adds a bias, zero at first.
      kernel_init: of the (KY, KX, C / groups, features) kernel.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: Pair
    stride: Pair = 1
    padding: Padding | None = None
    dilation: Pair = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.he_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels; raises ValueError as `ops.convolution`."""
        size = pair("Conv", "kernel_size", self.kernel_size)
        channels = _channels_per_group("Conv", x, self.groups)
        kernel = self.param("kernel", self.kernel_init, (*size, channels, self.features))
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        out = convolution(
            x,
            kernel,
            stride=self.stride,
            padding=self._padding(size),
            dilation=self.dilation,
            groups=self.groups,
        )
        return out if bias is None else out + bias[None, None, None, :]

    def _padding(self, size: tuple[int, int]) -> Padding:
        if self.padding is not None:
            return self.padding
        dilation = pair("Conv", "dilation", self.dilation)
        return tuple(d * (k - 1) // 2 for d, k in zip(dilation, size, strict=True))


class ConvTranspose(nn.Module):
    """A transposed convolution: the image grows by the stride, exactly, unless told otherwise.

    Attributes:
      features: channels of the output.
      kernel_size: one value or (y, x).
      stride: one value or (y, x).
      padding: as of `ops.transposed_convolution`; None is the one (with its
        output_padding) that makes the output stride times the input, which an
        even kernel without a stride cannot.
      output_padding: only beside a padding.
      dilation: one value or (y, x).
      groups: that see only their own channels.
      use_bias: adds a bias, zero at first.
      kernel_init: of the (KY, KX, C / groups, features) kernel.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: Pair
    stride: Pair = 1
    padding: Pair | None = None
    output_padding: Pair = 0
    dilation: Pair = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.he_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels; raises ValueError as the operation."""
        size = pair("ConvTranspose", "kernel_size", self.kernel_size)
        channels = _channels_per_group("ConvTranspose", x, self.groups)
        kernel = self.param("kernel", self.kernel_init, (*size, channels, self.features))
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        padding, output_padding = self._padding(size)
        out = transposed_convolution(
            x,
            kernel,
            stride=self.stride,
            padding=padding,
            output_padding=output_padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return out if bias is None else out + bias[None, None, None, :]

    def _padding(self, size: tuple[int, int]) -> tuple[Pair, Pair]:
        if self.padding is not None:
            return self.padding, self.output_padding
        if self.output_padding != 0:
            raise ValueError(
                f"ConvTranspose: output_padding={self.output_padding} needs a padding; with "
                f"padding=None both are chosen so that the output is stride times the input"
            )
        strides = pair("ConvTranspose", "stride", self.stride)
        dilations = pair("ConvTranspose", "dilation", self.dilation)
        overlaps = [d * (k - 1) + 1 - s for d, k, s in zip(dilations, size, strides, strict=True)]
        padding = tuple(max(0, (overlap + 1) // 2) for overlap in overlaps)
        return padding, tuple(2 * p - o for p, o in zip(padding, overlaps, strict=True))


def _channels_per_group(function: str, x: Float[Array, "B Y X C"], groups: int) -> int:
    if x.shape[-1] % groups:
        raise ValueError(
            f"{function}: groups={groups} does not divide the {x.shape[-1]} channels of x of shape "
            f"{x.shape}; images are channels last (B, Y, X, C)"
        )
    return x.shape[-1] // groups
