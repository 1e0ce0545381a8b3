"""Image to tokens."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.layers.linear import Linear
from jaxmodels.ops.patches import patchify


class PatchEmbed(nn.Module):
    """One linear map of every patch, equal to a convolution whose stride is its kernel size.

    Attributes:
      width: of a token.
      patch_size: side of a patch in pixels.
      kernel_init: of the (P * P * C, width) matrix.
      dtype: of the computation.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", equation 1
    (arXiv:2010.11929).
    """

    width: int
    patch_size: int
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "*B Y X C"]) -> Float[Array, "*B N D"]:
        """Returns a token a patch, row by row; raises ValueError as `patchify` does."""
        patches = patchify(image, self.patch_size)
        return Linear(self.width, dtype=self.dtype, kernel_init=self.kernel_init, name="project")(
            patches
        )
