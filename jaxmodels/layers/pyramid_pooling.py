"""The spatial pyramid of YOLO: maxima over several windows, side by side."""

import itertools

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.ops.pooling import max_pool


class SPP(nn.Module):
    """Max-pools of stride one between two 1 x 1 convolutions; keeps the size of the map.

    h = conv(x),  out = conv(concat(h, max_5x5(h), max_9x9(h), max_13x13(h)))

    The windows are computed in series, each from the one before: the maximum over
    9 x 9 is the maximum over 5 x 5 of maxima over 5 x 5. With the default sizes
    that makes it what is known as SPPF, which is the same function.

    Attributes:
      features: channels of the output.
      kernel_sizes: sides of the windows: odd and ascending.
      norm: "batch" or "frozen".
      dtype: of the computation; parameters are float32.

    Source: Huang and Wang 2019, "DC-SPP-YOLO", section 3.2 (arXiv:1903.08589), after
    He et al. 2014 (arXiv:1406.4729); half the channels inside and SiLU as in the
    YOLO networks since the fifth.
    """

    features: int
    kernel_sizes: tuple[int, ...] = (5, 9, 13)
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B Y X F"]:
        """Returns a map of `features` channels.

        Args:
          x: a map with an even number of channels.
          train: normalises by the batch; updates the collection "batch_stats".

        Raises:
          ValueError: kernel sizes are not odd and ascending.
        """
        sizes = (1, *self.kernel_sizes)
        steps = [after - before for before, after in itertools.pairwise(sizes)]
        if any(step <= 0 or step % 2 for step in steps):
            raise ValueError(f"SPP: kernel_sizes={self.kernel_sizes} must be odd and ascending")
        options = {"norm": self.norm, "activation": nn.silu, "dtype": self.dtype}
        x = ConvNorm(x.shape[-1] // 2, 1, **options, name="reduce")(x, train=train)
        pooled = [x]
        for step in steps:
            pooled.append(max_pool(pooled[-1], step + 1, stride=1, padding=step // 2))
        x = jnp.concatenate(pooled, axis=-1)
        return ConvNorm(self.features, 1, **options, name="project")(x, train=train)
