"""The affine map of every token."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.ops import float8
from jaxmodels.ops.mesh_axes import axis_size


def linear(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None = None
) -> Float[Array, "*B F"]:
    """Multiplies the last axis by a matrix and adds a bias.

    out_bf = sum_d x_bd kernel_df + bias_f

    The leading axes are joined first. The gradient of the kernel then sums over
    one axis; over several, XLA copies both operands into transposed layouts,
    which costs a tenth of a transformer's training step on CPU. Only where devices
    have parts of sequences are they left alone: joined, these would be gathered.

    Args:
      x: any number of leading axes.
      kernel: input by output.
      bias: None for none.

    Returns:
      An array of x's leading shape, in the dtype of x and kernel.

    Raises:
      ValueError: the widths disagree.

    Source: the definition; the layout was chosen by measurement.
    """
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"linear: x of shape {x.shape} ends with width {x.shape[-1]}, but kernel of shape "
            f"{kernel.shape} takes {kernel.shape[0]}; parameters are of another model"
        )
    lead = x.shape[:-1] if axis_size("sequence") > 1 else (-1,)
    out = float8.product(jnp.matmul, x.reshape(*lead, x.shape[-1]), kernel)
    if bias is not None:
        out = out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)
    return out.reshape(*x.shape[:-1], kernel.shape[1])
