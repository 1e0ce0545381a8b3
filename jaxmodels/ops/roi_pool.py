"""RoI max pooling: the strongest features of boxes, rounded to whole pixels."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.platform import platform
from jaxmodels.ops.roi_samples import roi_size
from jaxmodels.ops.windows import Pair

# Beyond this many pixels of the map, RoIs are cut: bins stay exact in int32.
_FAR = 2**20


def roi_max_pool(
    x: Float[Array, "B Y X C"], rois: Float[Array, "_ N 4"], size: Pair, *, stride: float | int
) -> Float[Array, "B N PY PX C"]:
    """The largest values of regions of any size in a grid of one size.

    out[b, n, p, q, c] = max of x[b, y, x, c] over the pixels of bin (p, q): rows
    y1 + floor(p h / PY) to y1 + ceil((p + 1) h / PY) - 1, columns likewise, where corners
    are rounded to pixels of the map (halves away from zero) and h = max(1, y2 - y1 + 1)

    A bin without a pixel of the map is zero, and so is all of a RoI that is not
    finite. The gradient goes to where the maximum stood, of equal ones the first in
    reading order; RoIs have none. Found in a loop over the pixels of a bin, of all
    bins and channels at once: time O(N Y X C) at the most, if all RoIs cover the map.

    Args:
      x: feature maps.
      rois: xyxy in pixels of the image.
      size: (PY, PX) of the grid, or one value for both.
      stride: pixels of the image a pixel of x.

    Returns:
      In x's dtype.

    Raises:
      ValueError: batches disagree, an empty map, or a size or stride that is not
        positive.

    Source: Girshick 2015, "Fast R-CNN", section 2.1 (arXiv:1504.08083); rounding as in
    its code, in which the last row and column of a box belong to it.
    """
    grid = roi_size("roi_max_pool", x, rois, size, stride)
    tops, bottoms, lefts, rights = roi_bins(rois, grid, stride, x.shape[1:3], closed=True)

    def places_of_image(x, *ends):
        def one(ends):
            return _places_of_maxima(x, *ends)

        return lax.map(one, ends) if platform() == "cpu" else jax.vmap(one)(ends)

    # Reading at known places, the gradient is that of a gather.
    places = jax.vmap(places_of_image)(lax.stop_gradient(x), tops, bottoms, lefts, rights)
    batch, rows, columns, channels = x.shape
    flat = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # in which gradients are summed
    flat = flat.reshape(batch, 1, rows * columns, channels)
    found = jnp.maximum(places, 0).reshape(*rois.shape[:2], grid[0] * grid[1], channels)
    out = jnp.take_along_axis(flat, found, axis=2, mode="promise_in_bounds")
    return jnp.where(places >= 0, out.reshape(places.shape), 0).astype(x.dtype)


def roi_bins(
    rois: Float[Array, "B N 4"],
    size: tuple[int, int],
    stride: float | int,
    image_size: tuple[int, int],
    *,
    closed: bool,
) -> tuple[Int[Array, "B N PY"], Int[Array, "B N PY"], Int[Array, "B N PX"], Int[Array, "B N PX"]]:
    """The whole pixels of a map that belong to the bins of RoIs.

    Args:
      rois: xyxy in pixels of the image.
      size: (PY, PX) bins.
      stride: pixels of the image a pixel of the map.
      image_size: (Y, X) of the map.
      closed: the last row and column belong to the RoI.

    Returns:
      First row, row after the last, first column, column after the last, in the
      map; of bins outside of it, the first is not less than the one after the last.
    """
    rois = lax.stop_gradient(rois).astype(jnp.promote_types(rois.dtype, jnp.float32)) / stride
    rois = jnp.where(jnp.all(jnp.isfinite(rois), -1, keepdims=True), rois, -_FAR)
    corners = jnp.sign(rois) * jnp.floor(jnp.abs(rois) + 0.5)
    corners = jnp.clip(corners, -_FAR, _FAR).astype(jnp.int32)
    starts = corners[..., :2]
    sides = jnp.maximum(corners[..., 2:] - starts + closed, 1)

    def along(axis: int, bins: int, length: int) -> list[jax.Array]:
        number = jnp.arange(bins)[None, None]
        start, side = starts[..., axis, None], sides[..., axis, None]
        ends = number * side // bins, -(-(number + 1) * side // bins)
        return [jnp.clip(start + end, 0, length) for end in ends]

    return *along(1, size[0], image_size[0]), *along(0, size[1], image_size[1])


def _places_of_maxima(
    x: Float[Array, "Y X C"],
    tops: Int[Array, "PY"],
    bottoms: Int[Array, "PY"],
    lefts: Int[Array, "PX"],
    rights: Int[Array, "PX"],
) -> Int[Array, "PY PX C"]:
    """Where in the map, row by row, the maximum of each bin stands; -1 in an empty bin."""
    columns, wide = x.shape[1], jnp.max(rights - lefts)
    flat = x.reshape(-1, x.shape[-1])

    def look(n, best):
        values, places = best
        rows, row_columns = tops + n // wide, lefts + n % wide
        inside = (rows < bottoms)[:, None] & (row_columns < rights)[None, :]
        here = jnp.where(inside, rows[:, None] * columns + row_columns[None, :], 0)
        value = flat.at[here].get(mode="promise_in_bounds")
        better = inside[..., None] & ((value > values) | (places < 0) | jnp.isnan(value))
        return jnp.where(better, value, values), jnp.where(better, here[..., None], places)

    shape = (len(tops), len(lefts), x.shape[-1])
    start = jnp.zeros(shape, x.dtype), jnp.full(shape, -1, jnp.int32)
    return lax.fori_loop(0, jnp.max(bottoms - tops) * wide, look, start)[1]
