"""The affine map in the parameterisation of the neural tangent kernel."""

import math

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.ops.linear import linear


class NTKLinear(nn.Module):
    """An affine map whose parameters are all of size one, scaled when they are used.

    out = weight_scale / sqrt(D) x kernel + bias_scale bias,   kernel, bias ~ N(0, 1)

    What it computes at first is what `Linear` does with a normal kernel of variance
    weight_scale^2 / D. Gradients differ: a step of the same length changes the output
    by as much at any width D, so that the best learning rate of gradient descent does
    not depend on the width, and for infinite width training is that of a fixed kernel.
    It is gradient descent on `Linear` with the learning rate of the kernel multiplied
    by weight_scale^2 / D, and that of the bias by bias_scale^2.

    Attributes:
      features: width of the output.
      weight_scale: sqrt(2) keeps variance through ReLU, 1 without a nonlinearity.
      bias_scale: 0 leaves the bias out.
      dtype: of the computation; parameters are float32.

    Raises:
      ValueError: a scale that is negative, or a weight_scale of 0.

    Source: Jacot, Gabriel and Hongler 2018, "Neural Tangent Kernel", section 2
    (arXiv:1806.07572).
    """

    features: int
    weight_scale: float = 1.0
    bias_scale: float = 1.0
    dtype: Dtype = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.weight_scale <= 0 or self.bias_scale < 0:
            raise ValueError(
                f"NTKLinear: weight_scale={self.weight_scale}, bias_scale={self.bias_scale}; give "
                "a weight_scale above 0 and a bias_scale of at least 0"
            )

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns x with its last axis mapped to `features`, in `dtype`."""
        normal = nn.initializers.normal(1.0)
        kernel = self.param("kernel", normal, (x.shape[-1], self.features))
        # Scaled in float32: the factor is part of the parameters, whatever x is rounded to.
        kernel = self.weight_scale / math.sqrt(x.shape[-1]) * kernel
        bias = None
        if self.bias_scale:
            bias = self.bias_scale * self.param("bias", normal, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return linear(x, kernel, bias)
