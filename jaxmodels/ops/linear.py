"""The affine map of every token."""

from jaxtyping import Array, Float


def linear(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None = None
) -> Float[Array, "*B F"]:
    """Multiplies the last axis by a matrix and adds a bias.

    out_bf = sum_d x_bd kernel_df + bias_f

    The leading axes are joined first. The gradient of the kernel then sums over
    one axis; over several, XLA copies both operands into transposed layouts,
    which costs a tenth of a transformer's training step on CPU.

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
    out = x.reshape(-1, x.shape[-1]) @ kernel
    if bias is not None:
        out = out + bias[None, :]
    return out.reshape(*x.shape[:-1], kernel.shape[1])
