"""Transposed convolution: the gradient of a convolution as a layer, for upsampling."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmodels.ops.convolution import convolution
from jaxmodels.ops.platform import platform
from jaxmodels.ops.windows import Pair, pair


def transposed_convolution(
    x: Float[Array, "B Y X C"],
    kernel: Float[Array, "KY KX I F"],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Float[Array, "B V U F"]:
    """Lets every pixel paint its multiple of the kernel, `stride` apart; paint adds up.

    out[s y + d i - p, s x + d j - p, f] = sum_c kernel[i, j, c, f] x[y, x, c],
    summed over all (y, x, i, j) that meet in one place

    With groups=1 it is torch's `conv_transpose2d` with the kernel's axes permuted
    from (C, F, KY, KX) to (KY, KX, C, F), and the gradient of `convolution` with
    respect to its input where that kernel's last two axes are swapped.

    On a CPU, where XLA's gradient of it is some sixty times slower, it is one
    convolution of stride one that gives all stride^2 phases of the output.

    Args:
      x: images.
      kernel: I = C / groups input channels for each of F outputs.
      stride: s, one value or (y, x).
      padding: p, how much is cropped off every side of the painting.
      output_padding: rows below and columns to the right that are kept beyond
        that; less than stride or dilation.
      dilation: d, one value or (y, x).
      groups: the channels are cut into this many groups, each of which sees only
        itself; divides C and F.

    Returns:
      V = s (Y - 1) + d (KY - 1) + 1 - 2 p + output_padding rows, and U columns
      likewise.

    Raises:
      ValueError: shapes disagree, or nothing is left of the painting.

    Source: Long et al. 2015, "Fully Convolutional Networks for Semantic
    Segmentation", section 3.3 (arXiv:1411.4038); Dumoulin and Visin 2016, "A guide
    to convolution arithmetic", chapter 4 (arXiv:1603.07285).
    """
    name = "transposed_convolution"
    strides, dilations = pair(name, "stride", stride), pair(name, "dilation", dilation)
    crops = pair(name, "padding", padding, minimum=0)
    extras = pair(name, "output_padding", output_padding, minimum=0)
    _check(x, kernel, strides, crops, extras, dilations, groups)
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if platform() == "cpu" and groups == 1:
        return _by_phases(x, kernel, strides, crops, extras, dilations)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel.shape[:2], strict=True)]
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        [(r - p, r - p + extra) for r, p, extra in zip(reach, crops, extras, strict=True)],
        lhs_dilation=strides,
        rhs_dilation=dilations,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _by_phases(x, kernel, strides, crops, extras, dilations):
    """Each of the stride^2 phases of the output is a small convolution; all at once, then woven."""
    edges, taps, kept = [], [], []
    for axis in (0, 1):
        size = dilations[axis] * (kernel.shape[axis] - 1) + 1
        length = strides[axis] * (x.shape[axis + 1] - 1) + size + extras[axis] - 2 * crops[axis]
        taps.append(-(-(size + extras[axis]) // strides[axis]))
        edges.append((0, taps[axis] * strides[axis] - size, dilations[axis] - 1))
        kept.append(slice(crops[axis], crops[axis] + length))
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*edges, (0, 0, 0), (0, 0, 0)])
    channels, features = kernel.shape[2:]
    kernel = kernel.reshape(taps[0], strides[0], taps[1], strides[1], channels, features)
    kernel = kernel[::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5).reshape(*taps, channels, -1)
    out = convolution(x, kernel, padding=(taps[0] - 1, taps[1] - 1))
    batch, rows, columns, _ = out.shape
    out = out.reshape(batch, rows, columns, *strides, features).swapaxes(2, 3)
    out = out.reshape(batch, rows * strides[0], columns * strides[1], features)
    return out[:, kept[0], kept[1]]


def _check(x, kernel, strides, crops, extras, dilations, groups) -> None:
    name = "transposed_convolution"
    channels, features = kernel.shape[2] * groups, kernel.shape[3]
    if x.shape[3] != channels or features % groups:
        raise ValueError(
            f"{name}: kernel {kernel.shape} with groups={groups} takes {channels} channels and "
            f"gives {features}, but x of shape {x.shape} (B, Y, X, C) has {x.shape[3]}; groups "
            f"must divide both"
        )
    for extra, s, d in zip(extras, strides, dilations, strict=True):
        if extra >= max(s, d):
            raise ValueError(
                f"{name}: output_padding={extra} must be less than stride={s} or dilation={d}; "
                f"beyond that no kernel reaches"
            )
    for n, k, s, p, extra, d in zip(
        x.shape[1:3], kernel.shape[:2], strides, crops, extras, dilations, strict=True
    ):
        if s * (n - 1) + d * (k - 1) + 1 - 2 * p + extra < 1:
            raise ValueError(
                f"{name}: padding={p} crops all of an output of {s * (n - 1) + d * (k - 1) + 1}"
            )
