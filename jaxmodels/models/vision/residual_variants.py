"""Residual networks whose 3 x 3 convolutions are of another kind.

Paper    Dai et al. 2017, "Deformable Convolutional Networks" (arXiv:1703.06211),
         section 4.2: deformable 3 x 3 convolutions in the last stage.
Differs  All channels share their offsets, where the authors' code has four groups.
Weights  The parameters have the names of `ResNet`'s; offsets, which no ResNet has,
         start at zero, where the network computes what the ResNet does.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.deformable import DeformableConv
from jaxmodels.layers.normalization import batch_norm
from jaxmodels.models.vision.resnet import ResidualBlock, ResNet
from jaxmodels.registry import module_fields

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class VariantUnit(nn.Module):
    """A `ConvNorm` of 3 x 3 with a convolution to choose.

    Attributes:
      conv: makes the convolution, from the arguments of `Conv`.
      features, stride, dilation, norm, activation, scale_init, dtype: as of `ConvNorm`.
    """

    conv: Callable[..., nn.Module]
    features: int
    stride: int = 1
    dilation: int = 1
    norm: str = "batch"
    activation: Callable | None = nn.relu
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels."""
        x = self.conv(
            self.features,
            3,
            stride=self.stride,
            dilation=self.dilation,
            use_bias=False,
            kernel_init=_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = batch_norm(self.norm, train, self.dtype, "norm", scale_init=self.scale_init)(x)
        return x if self.activation is None else self.activation(x)


class VariantBlock(ResidualBlock):
    """A `ResidualBlock` whose 3 x 3 convolutions are made by `conv`.

    Attributes:
      conv: makes a convolution, from the arguments of `Conv`.
      others: as of `ResidualBlock`.
    """

    conv: Callable[..., nn.Module] = Conv

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels, smaller by the stride."""
        common = {"norm": self.norm, "dtype": self.dtype}
        point = partial(ConvNorm, kernel_init=_init, **common)
        wide = partial(VariantUnit, self.conv, **common)
        last = {"activation": None, "scale_init": nn.initializers.zeros}
        if self.bottleneck:
            narrow = self.features // 4
            early, late = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
            units = [
                point(narrow, 1, stride=early, name="conv_1"),
                wide(narrow, stride=late, dilation=self.dilation, name="conv_2"),
                point(self.features, 1, **last, name="conv_3"),
            ]
        else:
            units = [
                wide(self.features, stride=self.stride, dilation=self.dilation, name="conv_1"),
                wide(self.features, dilation=self.dilation, **last, name="conv_2"),
            ]
        shortcut = x
        if self.project:
            project = point(self.features, 1, stride=self.stride, activation=None, name="shortcut")
            shortcut = project(x, train=train)
        for unit in units:
            x = unit(x, train=train)
        return nn.relu(x + shortcut)


class DeformableResNet(ResNet):
    """A `ResNet` whose last stage has deformable 3 x 3 convolutions (v1: moved, not weighed)."""

    def _stage(self, index: int) -> list[ResidualBlock]:
        blocks = super()._stage(index)
        if index < len(self.depths) - 1:
            return blocks
        conv = partial(DeformableConv, modulated=False)
        fields = [{name: getattr(block, name) for name in module_fields(block)} for block in blocks]
        return [VariantBlock(**each, conv=conv) for each in fields]
