"""Nonlinearities that learn."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jaxmodels.layers.linear import Linear
from jaxmodels.ops.activations import maxout, prelu, threshold_perceptron


class PReLU(nn.Module):
    """A leaky ReLU that learns its slope.

    Attributes:
      per_channel: one slope for each channel, or one for all.
      initial: the slope to begin with.

    Source: He et al. 2015, "Delving Deep into Rectifiers", section 2.1
    (arXiv:1502.01852).
    """

    per_channel: bool = True
    initial: float = 0.25

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Returns an array of x's shape and dtype."""
        count = x.shape[-1] if self.per_channel else 1
        slope = self.param("slope", nn.initializers.constant(self.initial), (count,))
        return prelu(x, slope.astype(x.dtype))


class Maxout(nn.Module):
    """The largest of several affine maps.

    Attributes:
      features: width of the output.
      pieces: affine maps for each output.
      kernel_init: of the (in, features * pieces) kernel.
      dtype: of the computation.

    Source: Goodfellow et al. 2013, "Maxout Networks", section 3
    (arXiv:1302.4389).
    """

    features: int
    pieces: int = 2
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns x with its last axis mapped to `features`."""
        width = self.features * self.pieces
        maps = Linear(width, kernel_init=self.kernel_init, dtype=self.dtype, name="maps")
        return maxout(maps(x), self.pieces)


class ThresholdPerceptron(nn.Module):
    """Rosenblatt's: fires or not. It learns by its rule, see `ops.threshold_perceptron`.

    Attributes:
      features: number of neurons.
      use_bias: learns thresholds; without them every boundary passes through the origin.
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns 0 or 1 for each neuron, in x's dtype."""
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.features,)) if self.use_bias else None
        return threshold_perceptron(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=x.dtype))
