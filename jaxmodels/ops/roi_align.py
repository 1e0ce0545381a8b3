"""RoIAlign: the features of boxes, without rounding where they lie."""

from jaxtyping import Array, Float

from jaxmodels.ops.roi_samples import bin_samples, images_of_bins, roi_size, sample_bins
from jaxmodels.ops.windows import Pair


def roi_align(
    x: Float[Array, "B Y X C"],
    rois: Float[Array, "_ N 4"],
    size: Pair,
    *,
    stride: float | int,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Float[Array, "B N PY PX C"]:
    """Features of regions of any size in a grid of one size, interpolated bilinearly.

    out[b, n, p, q, c] = mean over R x R samples of x[b, y, x, c],
    y = y1 / stride - 1/2 + h (p + (r + 1/2) / R) / PY,  x likewise, h = (y2 - y1) / stride

    A sample up to one pixel outside the centres of the outermost pixels reads
    those; one further outside reads zero, and so does all of a RoI that is not
    finite. In a RoI of no size all bins read one point; one of negative size is
    read backwards. The gradient is that of x; RoIs have none. Time O(B N PY PX R^2 C).

    Args:
      x: feature maps.
      rois: xyxy in pixels of the image.
      size: (PY, PX) of the grid, or one value for both.
      stride: pixels of the image a pixel of x.
      sampling_ratio: R; samples along each side of a bin.
      aligned: as in the equation. False is the rule of before Detectron2: without
        the -1/2, and with sides of one pixel of x at the least.

    Returns:
      In x's dtype.

    Raises:
      ValueError: batches disagree, an empty map, or a size, stride or ratio that is
        not positive; shapes are static, so the ratio cannot depend on the RoI.

    Source: He et al. 2017, "Mask R-CNN", section 3 (arXiv:1703.06870); what happens at
    the border, and `aligned`, as in Detectron2 and torchvision.
    """
    grid = roi_size("roi_align", x, rois, size, stride, sampling_ratio)
    places = bin_samples(rois, grid, stride, sampling_ratio, aligned=aligned)
    return sample_bins(x, images_of_bins(rois, grid), *places)
