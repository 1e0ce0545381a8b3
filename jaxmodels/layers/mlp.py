"""The feed-forward half of a transformer block."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.layers.linear import Linear


class Mlp(nn.Module):
    """Two linear maps with a GELU (tanh approximation) in between.

    Attributes:
      hidden_width: F, between the two.
      kernel_init: of both matrices.
      dtype: of the computation.
    """

    hidden_width: int
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns an array of x's shape in `dtype`."""
        h = Linear(self.hidden_width, dtype=self.dtype, kernel_init=self.kernel_init, name="up")(x)
        h = jax.nn.gelu(h, approximate=True)
        return Linear(x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name="down")(h)
