"""Convolution that learns where to look."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.layers.convolution import Conv
from jaxmodels.ops.deformable import deformable_convolution
from jaxmodels.ops.windows import Padding, Pair, pair


class DeformableConv(nn.Module):
    """A convolution whose taps a second convolution, of the same input, moves and weighs.

    That one starts at zero: nothing is moved, and if modulated every tap counts
    half, as in section 3.2 of the second paper. So the layer starts as a plain
    convolution, or as half of one. (Some implementations double the sigmoid;
    weights made for those need their kernel doubled here.) The papers train it
    at a tenth of the learning rate in detectors.

    Attributes:
      features: channels of the output.
      kernel_size: one value or (y, x).
      stride: one value or (y, x).
      padding: as of `ops.convolution`; None is dilation * (kernel_size - 1) // 2.
      dilation: one value or (y, x).
      groups: that see only their own channels.
      offset_groups: of channels whose taps move on their own.
      modulated: whether taps are weighed as well as moved (v2), or only moved (v1).
      use_bias: adds a bias, zero at first.
      kernel_init: of the (KY, KX, C / groups, features) kernel.
      dtype: of the computation; parameters and the points sampled are float32.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", section 2.1
    (arXiv:1703.06211); Zhu et al. 2019, "Deformable ConvNets v2", section 3.2
    (arXiv:1811.11168).
    """

    features: int
    kernel_size: Pair
    stride: Pair = 1
    padding: Padding | None = None
    dilation: Pair = 1
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.he_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels; raises ValueError as the operation.

        The submodule "offsets" returns (B, V, U, G KY KX 2), followed by the
        logits of the G KY KX masks if modulated; `capture_intermediates` shows it.
        """
        size = pair("DeformableConv", "kernel_size", self.kernel_size)
        if self.groups < 1 or x.shape[-1] % self.groups:
            raise ValueError(
                f"DeformableConv: groups={self.groups} does not divide the {x.shape[-1]} channels "
                f"of x {x.shape} (B, Y, X, C)"
            )
        shape = (*size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        dilation = pair("DeformableConv", "dilation", self.dilation)
        same = tuple(d * (k - 1) // 2 for d, k in zip(dilation, size, strict=True))
        padding = same if self.padding is None else self.padding
        offsets, mask = self._taps(x, size, padding)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        out = deformable_convolution(
            x,
            kernel,
            offsets,
            mask=mask,
            stride=self.stride,
            padding=padding,
            dilation=dilation,
            groups=self.groups,
            offset_groups=self.offset_groups,
        )
        return out if bias is None else out + bias[None, None, None, :]

    def _taps(self, x, size: tuple[int, int], padding: Padding):
        """Offsets and mask (or None) of every tap."""
        zeros, taps = nn.initializers.zeros, self.offset_groups * size[0] * size[1]
        # In float32 whatever the dtype: bfloat16 has a hundredth of a pixel only near zero.
        made = Conv(
            features=taps * (3 if self.modulated else 2),
            kernel_size=size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            kernel_init=zeros,
            name="offsets",
        )(x)
        shape = (*made.shape[:3], self.offset_groups, *size)
        offsets = made[..., : 2 * taps].reshape(*shape, 2)
        mask = nn.sigmoid(made[..., 2 * taps :]).reshape(shape) if self.modulated else None
        return offsets, mask
