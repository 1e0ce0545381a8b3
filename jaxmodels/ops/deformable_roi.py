"""RoI pooling whose bins go where they are sent."""

from jaxtyping import Array, Float

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.position_sensitive import split_by_bin
from jaxmodels.ops.roi_samples import bin_samples, images_of_bins, roi_size, sample_bins
from jaxmodels.ops.windows import Pair


def deformable_roi_pool(
    x: Float[Array, "B Y X C"],
    rois: Float[Array, "_ N 4"],
    offsets: Float[Array, "..."],
    size: Pair,
    *,
    stride: float | int,
    scale: float = 0.1,
    mask: Float[Array, "..."] | None = None,
    sampling_ratio: int = 2,
) -> Float[Array, "B N PY PX C"]:
    """`roi_align` with every bin moved by a share of the region's size.

    out[b, n, p, q] = mask[b, n, p, q] * mean over R x R samples of x[b, y + dy, x + dx],
    (dy, dx) = scale (h, w) * offsets[b, n, p, q], (y, x) and (h, w) as of `roi_align`

    The papers take the mean over all whole pixels of a bin, read at the place moved to;
    as with `roi_align`, samples take their place, whose number is fixed. Gradients of
    x, offsets and mask; RoIs have none. Time O(B N PY PX R^2 C).

    Args:
      x: feature maps.
      rois: xyxy in pixels of the image.
      offsets: (B, N, PY, PX, 2), (dy, dx) in sides of the RoI before `scale`.
      size: (PY, PX) of the grid, or one value for both.
      stride: pixels of the image a pixel of x.
      scale: of the offsets; the papers' gamma.
      mask: (B, N, PY, PX), factors of the bins (v2), or None (v1).
      sampling_ratio: R; samples along each side of a bin.

    Returns:
      In x's dtype.

    Raises:
      ValueError: shapes disagree, an empty map, or a size, stride or ratio that is
        not positive.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", section 2.2,
    equations 5 and 6 (arXiv:1703.06211); the mask from Zhu et al. 2019, "Deformable
    ConvNets v2", section 3.2, equation 2 (arXiv:1811.11168).
    """
    function = "deformable_roi_pool"
    grid = roi_size(function, x, rois, size, stride, sampling_ratio)
    _check(function, offsets, mask, (*rois.shape[:2], *grid))
    places = bin_samples(rois, grid, stride, sampling_ratio, moves=scale * offsets)
    out = sample_bins(x, images_of_bins(rois, grid), *places)
    return out if mask is None else (out * mask[..., None]).astype(x.dtype)


def deformable_ps_roi_pool(
    x: Float[Array, "B Y X D"],
    rois: Float[Array, "_ N 4"],
    offsets: Float[Array, "..."],
    size: Pair,
    *,
    stride: float | int,
    scale: float = 0.1,
    mask: Float[Array, "..."] | None = None,
    sampling_ratio: int = 2,
) -> Float[Array, "B N PY PX C"]:
    """`deformable_roi_pool`, of the channels that belong to each bin.

    Args:
      x: D = PY PX C channels, ordered as in `position_sensitive`.
      rois, offsets, size, stride, scale, mask, sampling_ratio: as of
        `deformable_roi_pool`.

    Returns:
      In x's dtype.

    Raises:
      ValueError: as `deformable_roi_pool`, or channels that are not for so many bins.

    Source: Dai et al. 2017, section 2.2, "Position-Sensitive (PS) RoI Pooling"
    (arXiv:1703.06211).
    """
    function = "deformable_ps_roi_pool"
    grid = roi_size(function, x, rois, size, stride, sampling_ratio)
    _check(function, offsets, mask, (*rois.shape[:2], *grid))
    maps, images = split_by_bin(function, x, grid, rois.shape[1])
    places = bin_samples(rois, grid, stride, sampling_ratio, moves=scale * offsets)
    out = sample_bins(maps, images, *places)
    return out if mask is None else (out * mask[..., None]).astype(x.dtype)


def _check(function: str, offsets, mask, bins: tuple[int, ...]) -> None:
    require_shape(function, "offsets", offsets, (*bins, 2), "(B, N, PY, PX, 2)")
    if mask is not None:
        require_shape(function, "mask", mask, bins, "(B, N, PY, PX)")
