"""The feed-forward half of a transformer block."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.layers.linear import Linear
from jaxmodels.ops.activations import swiglu


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


class GatedMlp(nn.Module):
    """Two linear maps, one the gate of the other, and a third back: SwiGLU.

    out = W_down (silu(W_gate x) * W_up x)

    Attributes:
      hidden_width: F, of gate and up.
      kernel_init: of the three matrices, which have no bias.
      dtype: of the computation.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2
    (arXiv:2002.05202).
    """

    hidden_width: int
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns an array of x's shape in `dtype`."""

        def project(width, name, x):
            return Linear(
                width, use_bias=False, dtype=self.dtype, kernel_init=self.kernel_init, name=name
            )(x)

        gate, up = (project(self.hidden_width, name, x) for name in ("gate", "up"))
        return project(x.shape[-1], "down", swiglu(gate, up))
