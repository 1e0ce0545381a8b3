"""Convolution of images, channels last."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmodels.ops.depthwise import depthwise_convolution
from jaxmodels.ops.float8 import float8_products
from jaxmodels.ops.linear import linear
from jaxmodels.ops.platform import platform
from jaxmodels.ops.stored import stored
from jaxmodels.ops.windows import Padding, Pair, padding_pairs, pair, window_counts

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Below so many channels XLA's own gradient of the kernel beats matrix products.
_CHANNELS = 64


def convolution(
    x: Float[Array, "B Y X C"],
    kernel: Float[Array, "KY KX I F"],
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Float[Array, "B V U F"]:
    """Slides a kernel over an image (a cross-correlation, as in torch).

    out[y, x, f] = sum_(i, j, c) kernel[i, j, c, f] x[s y + d i - p, s x + d j - p, c]

    This is `lax.conv_general_dilated` and its gradient, but on a CPU: there a
    depthwise convolution (groups = C = F) is `depthwise_convolution`, one of 1 x 1
    is `linear` (whose kernel gradient is eight times faster), the kernel gradient of
    wide ones is a matrix product for each row of the kernel (1.4 times faster), and the
    other gradients are written so that they are as fast in a loop or a branch, where
    `jax.grad` of a convolution takes sixty times as long; forward-mode differentiation
    is then not defined.

    Args:
      x: images.
      kernel: I = C / groups input channels for each of F outputs.
      stride: s, one value or (y, x).
      padding: p zeros around the image: one value, (y, x), or ((top, bottom),
        (left, right)).
      dilation: d, one value or (y, x).
      groups: the channels are cut into this many groups, each of which sees only
        itself; divides C and F.

    Returns:
      V = (Y + top + bottom - dilation (KY - 1) - 1) // stride + 1 rows, and U
      columns likewise.

    Raises:
      ValueError: shapes disagree, or the padded image is smaller than the kernel.

    Source: the definition; dilation from Yu and Koltun 2016, "Multi-Scale Context
    Aggregation by Dilated Convolutions", section 2 (arXiv:1511.07122).
    """
    name = "convolution"
    strides, dilations = pair(name, "stride", stride), pair(name, "dilation", dilation)
    sides = padding_pairs(name, padding)
    _check_channels(x, kernel, groups)
    window_counts(name, x.shape[1:3], kernel.shape[:2], strides, sides, dilations)
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if groups > 1 and groups == x.shape[3] == kernel.shape[3]:
        return depthwise_convolution(
            x, kernel[:, :, 0], stride=strides, padding=sides, dilation=dilations
        )
    if platform() != "cpu" or groups > 1:
        return _plain(x, kernel, strides, sides, dilations, groups)
    if kernel.shape[:2] == (1, 1):
        padded = jnp.pad(x, ((0, 0), *sides, (0, 0)))
        with float8_products(False):  # as other convolutions
            return linear(padded[:, :: strides[0], :: strides[1]], kernel[0, 0])
    return _on_cpu(x, kernel, strides, sides, dilations)


def _plain(x, kernel, strides, sides, dilations, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        sides,
        rhs_dilation=dilations,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _on_cpu(x, kernel, strides, sides, dilations):
    return _plain(x, kernel, strides, sides, dilations)


def _forward(x, kernel, strides, sides, dilations):
    return _plain(x, kernel, strides, sides, dilations), (x, kernel)


def _backward(strides, sides, dilations, saved, g):
    # What is made of x and the kernel for a product is not made before there is a gradient.
    x, kernel, g = lax.optimization_barrier((*saved, g))
    wide = min(kernel.shape[2:]) >= _CHANNELS
    to_kernel = _wide_kernel_gradient if wide else _narrow_kernel_gradient
    options = strides, sides, dilations
    return _input_gradient(x, g, kernel, *options), to_kernel(x, g, kernel, *options)


_on_cpu.defvjp(_forward, _backward)

# XLA runs a convolution on a CPU by Eigen if its axes lie as in _LAYOUT, and brings others into
# that order only outside of loops and branches; so both gradients are written in it.


def _input_gradient(x, g, kernel, strides, sides, dilations):
    """A convolution of what came back, spread out by the stride, with the mirrored kernel."""
    spans = _spans(x, g, kernel, strides, sides, dilations)
    padding = [(reach - low, beyond) for reach, low, beyond in spans]
    return lax.conv_general_dilated(
        g,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        dimension_numbers=_LAYOUT,
    )


def _narrow_kernel_gradient(x, g, kernel, strides, sides, dilations):
    """A convolution of the image, channels as images, with what came back as the kernel."""
    spans = _spans(x, g, kernel, strides, sides, dilations)
    padding = [(low, reach - beyond) for reach, low, beyond in spans]
    found = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        dilations,
        padding,
        rhs_dilation=strides,
        dimension_numbers=_LAYOUT,
    )
    return found.transpose(1, 2, 0, 3)


def _spans(x, g, kernel, strides, sides, dilations):
    """Of each axis: the kernel's reach, the padding before, and pixels after the last place."""
    for axis in (0, 1):
        low, last = sides[axis][0], (g.shape[1 + axis] - 1) * strides[axis]
        reach = dilations[axis] * (kernel.shape[axis] - 1)
        yield reach, low, x.shape[1 + axis] + low - last - 1


def _wide_kernel_gradient(x, g, kernel, strides, sides, dilations):
    """A matrix product for each row of the kernel: what came back times what the row saw.

    What came back is transposed once, and first: with many rows and few columns on both
    sides, a product that transposes its operand itself takes twice the time.
    """
    rows, columns, channels, features = kernel.shape
    padded = jnp.pad(x, ((0, 0), *sides, (0, 0)))
    came_back = stored(g.reshape(-1, features).T)

    def seen(i, j):
        low = slice(i, i + (g.shape[1] - 1) * strides[0] + 1, strides[0])
        left = slice(j, j + (g.shape[2] - 1) * strides[1] + 1, strides[1])
        return padded[:, low, left]

    def row(i):
        parts = [seen(i * dilations[0], j * dilations[1]) for j in range(columns)]
        return came_back @ jnp.concatenate(parts, axis=-1).reshape(-1, columns * channels)

    found = jnp.stack([row(i) for i in range(rows)])
    return found.reshape(rows, features, columns, channels).transpose(0, 2, 3, 1)


def _check_channels(x: jax.Array, kernel: jax.Array, groups: int) -> None:
    channels, features = kernel.shape[2] * groups, kernel.shape[3]
    if x.shape[3] != channels:
        hint = "the image looks channels first; move axis 1 last"
        raise ValueError(
            f"convolution: x of shape {x.shape} (B, Y, X, C) has {x.shape[3]} channels, but kernel "
            f"{kernel.shape} with groups={groups} takes {channels}"
            + (f"; {hint}" if x.shape[1] == channels else "")
        )
    if features % groups:
        raise ValueError(
            f"convolution: groups={groups} does not divide the {features} outputs of kernel "
            f"{kernel.shape}"
        )
