"""The affine map with parameters."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.ops.linear import linear


class Linear(nn.Module):
    """As `flax.linen.Dense`, with the faster gradient of `ops.linear`.

    Attributes:
      features: width of the output.
      use_bias: adds a bias.
      kernel_init: of the (in, out) kernel; the bias starts at zero.
      dtype: of the computation; parameters are float32.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns x with its last axis mapped to `features`, in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return linear(x, kernel, bias)
