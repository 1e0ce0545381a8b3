"""RoIAlign from a pyramid: each region from the map of its size."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.boxes import box_area
from jaxmodels.ops.roi_align import roi_align
from jaxmodels.ops.windows import Pair

# A region of this many pixels a side is pooled from the map of this stride.
CANONICAL_SIZE, _CANONICAL_STRIDE = 224.0, 16
# Keeps a region of exactly a power of two on its level in float32, and logarithms finite.
_EPSILON = 1e-6
# Repeated pixels above and on the left, below and on the right.
_MARGIN = (1, 2)


def pyramid_level(
    rois: Float[Array, "*B 4"],
    strides: Sequence[int],
    *,
    canonical_size: float | int = CANONICAL_SIZE,
) -> Int[Array, "*B"]:
    """Which map of a pyramid each region is pooled from.

    stride = 2^floor(log2(16 sqrt(area) / canonical_size)), the nearest that is there

    Args:
      rois: xyxy in pixels.
      strides: of the maps, each twice the one before.
      canonical_size: side of the regions that are pooled from stride 16.

    Returns:
      Indices of `strides`.

    Raises:
      ValueError: strides are not powers of two in a row.

    Source: Lin et al. 2017, "Feature Pyramid Networks", equation 1
    (arXiv:1612.03144).
    """
    first = int(math.log2(strides[0]))
    if [*strides] != [2 ** (first + i) for i in range(len(strides))]:
        raise ValueError(
            f"pyramid_level: strides={[*strides]} are not powers of two in a row; leave out maps "
            f"of equal stride"
        )
    side = jnp.sqrt(jnp.maximum(box_area(rois), _EPSILON))
    scale = jnp.log2(side / canonical_size) + _EPSILON
    level = jnp.floor(math.log2(_CANONICAL_STRIDE) + scale).astype(jnp.int32) - first
    return jnp.clip(level, 0, len(strides) - 1)


def pyramid_roi_align(
    maps: Sequence[Float[Array, "B _ _ C"]],
    rois: Float[Array, "B N 4"],
    size: Pair,
    *,
    strides: Sequence[int],
    canonical_size: float | int = CANONICAL_SIZE,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Float[Array, "B N PY PX C"]:
    """`roi_align` of each region on the map that `pyramid_level` gives it.

    The maps are laid below each other on one canvas, with their borders repeated
    around them, and the regions are moved to where their map lies: every region is
    pooled once, from one array, whatever its level. Copying the maps costs less than
    twice the finest of them.

    Args:
      maps: of a pyramid, finest first.
      rois: xyxy in pixels; cut to the maps, so nothing outside is ever seen.
      size: of what is pooled from each region.
      strides: of the maps, powers of two in a row.
      canonical_size: as of `pyramid_level`.
      sampling_ratio, aligned: as of `roi_align`; without `aligned`, a region narrower
        than a pixel of its map is widened, and over the lower and right border sees
        the border's values, not zeros.

    Returns:
      Pooled regions, in the maps' dtype.

    Raises:
      ValueError: numbers of maps and strides disagree, or as of `pyramid_level`.

    Source: Lin et al. 2017, section 4.2 (arXiv:1612.03144); He et al. 2017, "Mask
    R-CNN", section 3 (arXiv:1703.06870).
    """
    options = {"sampling_ratio": sampling_ratio, "aligned": aligned}
    if len(maps) != len(strides):
        raise ValueError(f"pyramid_roi_align: {len(maps)} maps need as many strides, not {strides}")
    if len(maps) == 1:
        return roi_align(maps[0], rois, size, stride=strides[0], **options)
    level = pyramid_level(rois, strides, canonical_size=canonical_size)
    canvas, tops = _canvas(maps)
    extents = jnp.array([each.shape[2:0:-1] * 2 for each in maps], jnp.float32)
    moved = rois / jnp.array(strides, jnp.float32)[level][..., None]
    moved = jnp.clip(moved, 0, extents[level])
    corners = jnp.array([(_MARGIN[0], top + _MARGIN[0]) * 2 for top in tops], jnp.float32)
    return roi_align(canvas, moved + corners[level], size, stride=1, **options)


def _canvas(maps: Sequence[Array]) -> tuple[Float[Array, "B Y X C"], list[int]]:
    """The maps below each other, and the row where each begins."""
    width = max(each.shape[2] for each in maps)
    rows, tops, top = [], [], 0
    for each in maps:
        framed = jnp.pad(each, ((0, 0), _MARGIN, _MARGIN, (0, 0)), mode="edge")
        rows.append(jnp.pad(framed, ((0, 0), (0, 0), (0, width - each.shape[2]), (0, 0))))
        tops.append(top)
        top += framed.shape[1]
    return jnp.concatenate(rows, axis=1), tops
