"""Attention windows: an image cut into squares, shifted by half of one, and put together again."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def window_partition(x: Float[Array, "B Y X C"], size: int) -> Float[Array, "B N T C"]:
    """Cuts an image into square windows, row by row.

    out[n, (p, q)] = x[n // (X/size) * size + p, n % (X/size) * size + q]

    Args:
      x: images whose sides are multiples of size.
      size: side of a window in pixels.

    Returns:
      N = (Y/size)(X/size) windows of T = size^2 pixels each.

    Raises:
      ValueError: size does not divide the sides.

    Source: Liu et al. 2021, "Swin Transformer", section 3.2 (arXiv:2103.14030).
    """
    batch, height, width, channels = x.shape
    if height % size or width % size:
        raise ValueError(
            f"window_partition: size={size} does not divide an image of {height} x {width} pixels "
            f"(shape {x.shape}, channels last); pad it"
        )
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size, channels)


def window_reverse(
    windows: Float[Array, "B N T C"], height: int, width: int, size: int
) -> Float[Array, "B Y X C"]:
    """Puts windows back together; the inverse of `window_partition`.

    Args:
      windows: row by row.
      height, width: of the image in pixels.
      size: side of a window in pixels.

    Raises:
      ValueError: the windows are not those of such an image.
    """
    batch, count, area, channels = windows.shape
    if height % size or width % size or (count, area) != (height * width // size**2, size**2):
        raise ValueError(
            f"window_reverse: windows of shape {windows.shape} are not those of {height} x {width} "
            f"pixels in windows of {size} x {size}"
        )
    x = windows.reshape(batch, height // size, width // size, size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, height, width, channels)


def shift_mask(height: int, width: int, size: int, shift: int) -> Bool[np.ndarray, "N T T"]:
    """Which pixels of a window were neighbours before a cyclic shift: a constant.

    The shift by `shift` to the top and left brings pixels of the first rows and
    columns beside those of the last; they must not see each other.

    Args:
      height, width: of the image, multiples of size.
      size: side of a window.
      shift: in [0, size).

    Returns:
      True where a pixel may see another, one table a window.

    Source: Liu et al. 2021, section 3.2, "Efficient batch computation for shifted
    configuration" (arXiv:2103.14030).
    """
    wrapped = [np.arange(n) >= n - shift for n in (height, width)]
    region = 2 * wrapped[0][:, None] + wrapped[1][None, :]
    region = region.reshape(height // size, size, width // size, size).swapaxes(1, 2)
    region = region.reshape(-1, size * size)
    return region[:, :, None] == region[:, None, :]


def relative_places(size: int) -> Int[np.ndarray, "T T"]:
    """Index of each pair of pixels of a window into a table of their (2 size - 1)^2 offsets."""
    y, x = (axis.ravel() for axis in np.mgrid[:size, :size])
    down, across = (axis[:, None] - axis[None, :] + size - 1 for axis in (y, x))
    return down * (2 * size - 1) + across


def map_windows(
    attend: Callable[[Array, Array | None], Array],
    x: Float[Array, "B Y X C"],
    size: int,
    shift: int,
) -> Float[Array, "B Y X C"]:
    """Applies `attend` to every window of an image of any size.

    The image is padded with zeros at the bottom and right to whole windows and
    shifted cyclically to the top and left; both are undone afterwards. Time is
    linear in the number of pixels.

    Args:
      attend: from windows (B, N, T, C) and a mask (N, T, T), True where a pixel
        may see another, or None, to windows.
      x: images.
      size: side of a window.
      shift: in pixels, in [0, size).

    Returns:
      An array of x's shape.

    Raises:
      ValueError: shift is outside [0, size).

    Source: Liu et al. 2021, section 3.2 (arXiv:2103.14030).
    """
    if not 0 <= shift < size:
        raise ValueError(f"map_windows: shift={shift} must be in [0, size={size})")
    height, width = x.shape[1:3]
    down, right = -height % size, -width % size
    padded = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)))
    full = (height + down, width + right)
    mask = None
    if shift:
        padded = jnp.roll(padded, (-shift, -shift), axis=(1, 2))
        mask = jnp.asarray(shift_mask(*full, size, shift))
    out = window_reverse(attend(window_partition(padded, size), mask), *full, size)
    if shift:
        out = jnp.roll(out, (shift, shift), axis=(1, 2))
    return out[:, :height, :width]
