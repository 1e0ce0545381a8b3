"""The short causal convolution with its parameters."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from jaxmodels.ops.short_convolution import short_convolution


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over `size` steps, then SiLU.

    Attributes:
      size: W, how many steps it sees; the state holds size - 1.
      use_bias: adds a bias.
      dtype: of the computation; parameters are float32.

    Source: see `ops.short_convolution`.
    """

    size: int = 4
    use_bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        state: Float[Array, "B P D"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P D"]]:
        """Returns the activated outputs, and the inputs that a next call needs as `state`.

        Raises:
          ValueError: as `ops.short_convolution`.
        """
        # Uniform in +-1/sqrt(W), what a torch convolution with one input channel has.
        init = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=1
        )
        kernel = self.param("kernel", init, (self.size, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        out, state = short_convolution(
            x, kernel, bias, initial_state=state, segment_ids=segment_ids
        )
        return nn.silu(out), state
