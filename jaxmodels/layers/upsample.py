"""Maps of a network in a larger size, by any of the usual means."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.convolution import Conv, ConvTranspose
from jaxmodels.ops.pixel_shuffle import pixel_shuffle
from jaxmodels.ops.resize import resize

METHODS = ("nearest", "bilinear", "transposed", "pixel_shuffle")


class Upsample(nn.Module):
    """Enlarges a map to a given size, keeping its channels.

    "nearest" and "bilinear" have no parameters. "transposed" is a transposed
    convolution that starts as bilinear interpolation of each channel, and
    "pixel_shuffle" a 1 x 1 convolution to factor^2 times the channels, laid out as
    pixels, that starts as nearest; both make the map `factor` times as large and
    cut it to the size below and on the right.

    Attributes:
      factor: how many times larger than the map the size is, rounded up.
      method: one of the four.
      dtype: of the computation; parameters are float32.

    Source: Long et al. 2015, section 3.3 (arXiv:1411.4038), for "transposed"; Shi et
    al. 2016 (arXiv:1609.05158) for "pixel_shuffle"; its start from Aitken et al.
    2017, "Checkerboard artifact free sub-pixel convolution" (arXiv:1707.02937).
    """

    factor: int
    method: str = "bilinear"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Y X C"], size: tuple[int, int]
    ) -> Float[Array, "B V U C"]:
        """Returns the map with `size` rows and columns.

        Raises:
          ValueError: no such method, or `factor` times the map is less than size.
        """
        if self.method in ("nearest", "bilinear"):
            return resize(x.astype(self.dtype), size, method=self.method)
        if self.method not in METHODS:
            raise ValueError(f"Upsample: method={self.method!r} is none of {METHODS}")
        if self.factor * x.shape[1] < size[0] or self.factor * x.shape[2] < size[1]:
            raise ValueError(
                f"Upsample: size={size} is more than factor={self.factor} times a map of shape "
                f"{x.shape} (B, Y, X, C); take method='bilinear'"
            )
        grow = self._transposed if self.method == "transposed" else self._shuffled
        return grow(x)[:, : size[0], : size[1]]

    def _transposed(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U C"]:
        return ConvTranspose(
            x.shape[-1],
            2 * self.factor - self.factor % 2,
            stride=self.factor,
            kernel_init=bilinear_kernel,
            dtype=self.dtype,
            name="transposed",
        )(x)

    def _shuffled(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U C"]:
        def repeated(key, shape, dtype=jnp.float32):
            kernel = jnp.eye(shape[2], dtype=dtype)[None, None]
            return jnp.repeat(kernel, self.factor**2, axis=-1)

        features = x.shape[-1] * self.factor**2
        conv = Conv(features, 1, kernel_init=repeated, dtype=self.dtype, name="shuffled")
        return pixel_shuffle(conv(x), self.factor)


def bilinear_kernel(
    key: jax.Array, shape: tuple[int, int, int, int], dtype: Dtype = jnp.float32
) -> Float[Array, "KY KX C F"]:
    """Kernel with which a transposed convolution interpolates bilinearly.

    kernel[i, j, c, f] = [c = f] tent(i) tent(j),  tent(i) = 1 - |i - (k - 1) / 2| / s

    where s = (k + 1) // 2 is the stride.

    Args:
      key: not used; what initialisers are given.
      shape: (k, k, C, F).
      dtype: of the kernel.
    """
    del key
    tents = [
        1 - jnp.abs(jnp.arange(k, dtype=dtype) - (k - 1) / 2) / ((k + 1) // 2) for k in shape[:2]
    ]
    window = tents[0][:, None] * tents[1][None, :]
    return window[:, :, None, None] * jnp.eye(*shape[2:], dtype=dtype)[None, None]
