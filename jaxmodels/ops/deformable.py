"""Convolution whose kernel taps go where they are sent."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.sampling import bilinear_sample
from jaxmodels.ops.windows import Padding, Pair, padding_pairs, pair, window_counts


def deformable_convolution(
    x: Float[Array, "B Y X C"],
    kernel: Float[Array, "KY KX I F"],
    offsets: Float[Array, "..."],
    *,
    mask: Float[Array, "..."] | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    offset_groups: int = 1,
) -> Float[Array, "B V U F"]:
    """Convolution that reads each tap at a point of its own, between the pixels.

    out[y, x, f] = sum_(i, j, c) kernel[i, j, c, f] mask[y, x, g, i, j]
                     x(s y + d i - p + dy, s x + d j - p + dx, c),
    (dy, dx) = offsets[y, x, g, i, j], and g the offset group of channel c

    Every point is read by bilinear interpolation, with zeros outside the image.
    All taps are gathered first and then multiplied by the kernel in one matrix
    product, so memory is O(V U KY KX C) an image, as for a convolution by
    `im2col`, and time O(V U KY KX C F). Reverse mode only.

    Args:
      x: images.
      kernel: I = C / groups input channels for each of F outputs.
      offsets: (B, V, U, offset_groups, KY, KX, 2), (dy, dx) in pixels. The
        channels of torchvision's, (B, 2 G KY KX, V, U), count through the same
        axes G, KY, KX, 2 in this order, so theirs moved last and reshaped is ours.
      mask: (B, V, U, offset_groups, KY, KX), factors of the taps (v2), or None (v1).
      stride, padding, dilation, groups: as in `convolution`.
      offset_groups: the channels are cut into this many groups with offsets and
        mask of their own; divides C.

    Returns:
      V = (Y + top + bottom - dilation (KY - 1) - 1) // stride + 1 rows, and U
      columns likewise, in the dtype of x and kernel together.

    Raises:
      ValueError: shapes disagree, or the padded image is smaller than the kernel.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", equations 1 to 3
    (arXiv:1703.06211); the mask from Zhu et al. 2019, "Deformable ConvNets v2",
    section 3.2 (arXiv:1811.11168).
    """
    name = "deformable_convolution"
    strides, dilations = pair(name, "stride", stride), pair(name, "dilation", dilation)
    sides = padding_pairs(name, padding)
    _check_channels(x, kernel, groups, offset_groups)
    size = window_counts(name, x.shape[1:3], kernel.shape[:2], strides, sides, dilations)
    taps = (x.shape[0], *size, offset_groups, *kernel.shape[:2])
    require_shape(name, "offsets", offsets, (*taps, 2), "(B, V, U, offset_groups, KY, KX, 2)")
    points = offsets + _rigid_taps(size, kernel.shape[:2], strides, sides, dilations)
    if mask is not None:
        require_shape(name, "mask", mask, taps, "(B, V, U, offset_groups, KY, KX)")
    return _multiply(_read(x, points, mask), kernel, groups)


def _rigid_taps(size, kernel_size, strides, sides, dilations) -> Float[Array, "1 V U 1 KY KX 2"]:
    """(y, x) that a plain convolution reads."""
    y, x = (
        jnp.arange(count)[:, None] * s + jnp.arange(k)[None, :] * d - before
        for count, k, s, d, (before, _) in zip(
            size, kernel_size, strides, dilations, sides, strict=True
        )
    )
    shape = (1, *size, 1, *kernel_size)
    y = jnp.broadcast_to(y[None, :, None, None, :, None], shape)
    x = jnp.broadcast_to(x[None, None, :, None, None, :], shape)
    return jnp.stack([y, x], axis=-1).astype(jnp.float32)


def _read(
    x: Float[Array, "B Y X C"],
    points: Float[Array, "B V U G KY KX 2"],
    mask: Float[Array, "B V U G KY KX"] | None,
) -> Float[Array, "B V U G KY KX W"]:
    """Every tap's channels: the offset groups stand in for images of a larger batch."""
    batch, rows, columns, channels = x.shape
    groups = points.shape[3]
    x = x.reshape(batch, rows, columns, groups, channels // groups)
    x = jnp.moveaxis(x, 3, 1).reshape(batch * groups, rows, columns, channels // groups)

    def as_batch(places):
        places = jnp.moveaxis(places, 3, 1)
        return places.reshape(batch * groups, *places.shape[2:])

    scale = None if mask is None else as_batch(mask)
    taps = bilinear_sample(x, as_batch(points[..., ::-1]), scale=scale)
    return jnp.moveaxis(taps.reshape(batch, groups, *taps.shape[1:]), 1, 3)


def _multiply(
    taps: Float[Array, "B V U G KY KX W"], kernel: Float[Array, "KY KX I F"], groups: int
) -> Float[Array, "B V U F"]:
    """Sums over taps and channels, by one matrix product a group."""
    batch, rows, columns, _, ky, kx, _ = taps.shape
    inputs, features = kernel.shape[2:]
    taps = jnp.moveaxis(taps, 3, 5).reshape(-1, ky * kx, groups, inputs)
    taps = jnp.moveaxis(taps, 2, 0).reshape(groups, -1, ky * kx * inputs)
    kernel = kernel.reshape(ky * kx * inputs, groups, features // groups)
    out = taps @ jnp.moveaxis(kernel, 1, 0)
    return jnp.moveaxis(out, 0, 1).reshape(batch, rows, columns, features)


def _check_channels(x: jax.Array, kernel: jax.Array, groups: int, offset_groups: int) -> None:
    function, (*_, inputs, features) = "deformable_convolution", kernel.shape
    channels = x.shape[3]
    if channels != inputs * groups:
        hint = "; the image looks channels first, move axis 1 last"
        raise ValueError(
            f"{function}: x of shape {x.shape} (B, Y, X, C) has {channels} channels, but kernel "
            f"{kernel.shape} with groups={groups} takes {inputs * groups}"
            + (hint if x.shape[1] == inputs * groups else "")
        )
    if features % groups:
        raise ValueError(
            f"{function}: groups={groups} does not divide the {features} outputs of kernel "
            f"{kernel.shape}"
        )
    if offset_groups < 1 or channels % offset_groups:
        raise ValueError(
            f"{function}: offset_groups={offset_groups} does not divide the {channels} channels "
            f"of x {x.shape}"
        )
