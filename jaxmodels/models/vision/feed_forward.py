"""The feed-forward halves of vision transformers: exact GELU, and the gated one with biases."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.layers.linear import Linear
from jaxmodels.ops.activations import gelu, swiglu


class FeedForward(nn.Module):
    """Two linear maps with a GELU in between, as `layers.mlp.Mlp` with the exact GELU.

    Attributes:
      hidden_width: F, between the two.
      gated: SwiGLU instead, out = W_down (silu(a) * b) with a, b = W_up x, where
        `up` holds both halves.
      kernel_init: of the matrices; the biases start at zero.
      dtype: of the computation.
    """

    hidden_width: int
    gated: bool = False
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns an array of x's shape in `dtype`."""

        def project(width: int, name: str, x: Array) -> Array:
            return Linear(width, dtype=self.dtype, kernel_init=self.kernel_init, name=name)(x)

        if self.gated:
            gate, h = jnp.split(project(2 * self.hidden_width, "up", x), 2, axis=-1)
            h = swiglu(gate, h)
        else:
            h = gelu(project(self.hidden_width, "up", x))
        return project(x.shape[-1], "down", h)
