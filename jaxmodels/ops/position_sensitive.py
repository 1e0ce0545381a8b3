"""Position-sensitive RoI pooling: every bin of a region reads channels of its own.

Maps hold channels (PY, PX, C), the last fastest: bin (p, q) reads C channels from
(p PX + q) C on. The published code of R-FCN, and torchvision, count (C, PY, PX).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.cumulative import cumulative
from jaxmodels.ops.roi_pool import roi_bins
from jaxmodels.ops.roi_samples import bin_samples, roi_size, sample_bins
from jaxmodels.ops.windows import Pair


def ps_roi_pool(
    x: Float[Array, "B Y X D"], rois: Float[Array, "_ N 4"], size: Pair, *, stride: float | int
) -> Float[Array, "B N PY PX C"]:
    """The mean over each bin of a region, of the channels that belong to the bin.

    out[b, n, p, q, c] = mean of x[b, y, x, (p PX + q) C + c] over the pixels of bin (p, q):
    rows y1 + floor(p h / PY) to y1 + ceil((p + 1) h / PY) - 1, columns likewise, where
    corners are rounded to pixels of the map (halves away from zero) and h = max(1, y2 - y1)

    A bin without a pixel of the map is zero, and so is all of a RoI that is not
    finite. RoIs have no gradient. By sums over all pixels up to a corner, four of
    which give the sum over a bin of any size: time and memory O(Y X D + N D). The
    map's mean is taken off before, so that rounding loses little, about 1e-7 of the
    largest such sum; but one value that is not finite spoils bins it is not in.

    Args:
      x: D = PY PX C channels, ordered as the module says.
      rois: xyxy in pixels of the image.
      size: (PY, PX) of the grid, or one value for both.
      stride: pixels of the image a pixel of x.

    Returns:
      In x's dtype, summed in float32 at the least.

    Raises:
      ValueError: batches disagree, an empty map, channels that are not for so many
        bins, or a size or stride that is not positive.

    Source: Dai et al. 2016, "R-FCN", section 2, equation 1 (arXiv:1605.06409); sums by
    corners from Crow 1984, "Summed-area tables for texture mapping".
    """
    grid = roi_size("ps_roi_pool", x, rois, size, stride)
    maps, images = split_by_bin("ps_roi_pool", x, grid, rois.shape[1])
    tops, bottoms, lefts, rights = roi_bins(rois, grid, stride, x.shape[1:3], closed=False)
    maps = maps.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(maps, axis=(1, 2))
    table = _sums_to_corners(maps - mean[:, None, None])

    def to_corner(row, column) -> jax.Array:
        return table.at[images, row[:, :, :, None], column[:, :, None]].get(
            mode="promise_in_bounds"
        )

    upper, lower = (to_corner(row, rights) - to_corner(row, lefts) for row in (tops, bottoms))
    count = (bottoms - tops)[:, :, :, None] * (rights - lefts)[:, :, None]
    out = (lower - upper) / jnp.maximum(count, 1)[..., None] + mean[images]
    return jnp.where(count[..., None] > 0, out, 0).astype(x.dtype)


def ps_roi_align(
    x: Float[Array, "B Y X D"],
    rois: Float[Array, "_ N 4"],
    size: Pair,
    *,
    stride: float | int,
    sampling_ratio: int = 2,
) -> Float[Array, "B N PY PX C"]:
    """`roi_align`, of the channels that belong to each bin.

    Args:
      x: D = PY PX C channels, ordered as the module says.
      rois, size, stride, sampling_ratio: as of `roi_align`.

    Returns:
      In x's dtype.

    Raises:
      ValueError: as `roi_align`, or channels that are not for so many bins.

    Source: Li et al. 2017, "Light-Head R-CNN", section 3.2 (arXiv:1711.07264).
    """
    grid = roi_size("ps_roi_align", x, rois, size, stride, sampling_ratio)
    maps, images = split_by_bin("ps_roi_align", x, grid, rois.shape[1])
    return sample_bins(maps, images, *bin_samples(rois, grid, stride, sampling_ratio))


def split_by_bin(
    function: str, x: Float[Array, "B Y X D"], size: tuple[int, int], num_rois: int
) -> tuple[Float[Array, "I Y X C"], Int[Array, "B N PY PX"]]:
    """Returns the maps of every bin as images of their own, and which one each bin reads.

    Raises:
      ValueError: naming the function: channels that are not for so many bins.
    """
    batch, rows, columns, channels = x.shape
    bins = size[0] * size[1]
    if channels % bins:
        raise ValueError(
            f"{function}: the {channels} channels of x {x.shape} are not for {size[0]} x {size[1]} "
            f"bins; pass a multiple of {bins}"
        )
    maps = jnp.moveaxis(x.reshape(batch, rows, columns, bins, channels // bins), 3, 1)
    images = jnp.arange(batch * bins).reshape(batch, 1, *size)
    images = jnp.broadcast_to(images, (batch, num_rois, *size))
    return maps.reshape(batch * bins, rows, columns, channels // bins), images


def _sums_to_corners(x: Float[Array, "I Y X C"]) -> Float[Array, "I Y1 X1 C"]:
    """Sums over all rows and columns before each corner of pixels, the outer ones included."""
    for axis in (1, 2):
        x = cumulative(jnp.add, x, axis, initial=0.0)
    return jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
