"""What RoI operations that interpolate share: where bins are sampled, and the reading."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.pixel_sums import pixel_sums
from jaxmodels.ops.windows import Pair, pair


def bin_samples(
    rois: Float[Array, "B N 4"],
    size: tuple[int, int],
    stride: float | int,
    ratio: int,
    *,
    aligned: bool = True,
    moves: Float[Array, "B N PY PX 2"] | None = None,
) -> tuple[Float[Array, "B N PY PX R"], Float[Array, "B N PY PX R"]]:
    """Rows and columns, in pixels of the map, at which the bins of RoIs are sampled.

    A RoI is cut into PY x PX bins and each bin into R x R cells; a sample is at the
    centre of every cell. No gradient of RoIs: where they are is decided elsewhere.

    Args:
      rois: xyxy in pixels of the image.
      size: (PY, PX).
      stride: pixels of the image a pixel of the map.
      ratio: R.
      aligned: pixel (0, 0) of a map is the point (0.5, 0.5), as of an image, and
        RoIs have any size. False is the older rule: it is the point (0, 0), and a
        side is one pixel at the least.
      moves: (dy, dx) of every bin, in sides of the RoI.

    Returns:
      ys and xs, where 0 is the centre of the first pixel.
    """
    rois = lax.stop_gradient(rois).astype(jnp.promote_types(rois.dtype, jnp.float32)) / stride
    starts, sides = rois[..., :2], rois[..., 2:] - rois[..., :2]
    if aligned:
        starts = starts - 0.5
    else:
        sides = jnp.maximum(sides, 1)
    cells = [
        ((jnp.arange(n * ratio, dtype=rois.dtype) + 0.5) / (n * ratio)).reshape(n, ratio)
        for n in size
    ]
    moves = jnp.zeros((1, 1, *size, 2), rois.dtype) if moves is None else moves
    ys = cells[0][None, None, :, None] + moves[..., :1]
    xs = cells[1][None, None, None] + moves[..., 1:]
    starts, sides = (part[:, :, None, None, None] for part in (starts, sides))
    return starts[..., 1] + sides[..., 1] * ys, starts[..., 0] + sides[..., 0] * xs


def images_of_bins(rois: Float[Array, "B N 4"], size: tuple[int, int]) -> Int[Array, "B N PY PX"]:
    """Which image each bin of each RoI reads, where all bins of an image read the same."""
    images = jnp.arange(len(rois))[:, None, None, None]
    return jnp.broadcast_to(images, (*rois.shape[:2], *size))


def sample_bins(
    x: Float[Array, "I Y X C"],
    images: Int[Array, "*N"],
    ys: Float[Array, "*N R"],
    xs: Float[Array, "*N R"],
) -> Float[Array, "*N C"]:
    """The mean of R x R points of an image, of each bin its own, read between the pixels.

    out_n = sum_(r, s) x_(images_n)(ys_nr, xs_ns) / R^2, interpolated bilinearly

    A point up to one pixel outside the centres of the outermost pixels is moved to
    them; one further outside, or NaN, reads zero. Time O(N R^2 C), and no memory
    but the result's. Reverse mode only; the gradient of x is, on a CPU, a loop over
    all points, which is several times faster than a scatter of XLA's.

    Args:
      x: images.
      images: which of them, from 0 to I - 1; not checked.
      ys, xs: in pixels, where (0, 0) is the centre of the first one.

    Returns:
      Means in x's dtype, summed in float32 at the least.
    """
    count, ratio = images.size, ys.shape[-1]
    if count == 0:
        return jnp.zeros((*images.shape, x.shape[-1]), x.dtype)
    tops, upright = _between(ys.reshape(count, ratio), x.shape[1])
    lefts, flat = _between(xs.reshape(count, ratio), x.shape[2])
    # Two by two pixels are read at a time, also from an image with only one.
    x = jnp.pad(x, ((0, 0), *((0, max(0, 2 - n)) for n in x.shape[1:3]), (0, 0)))
    _, rows, columns, channels = x.shape
    corners = (images.reshape(count)[:, None] * rows + tops)[:, :, None] * columns + lefts[:, None]
    weights = upright[:, :, None, :, None] * flat[:, None, :, None, :] / ratio**2
    corners, weights = corners.reshape(count, ratio**2), weights.reshape(count, ratio**2, 4)
    return pixel_sums(x, corners, weights).reshape(*images.shape, channels)


def roi_size(
    function: str,
    x: jax.Array,
    rois: jax.Array,
    size: Pair,
    stride: float | int,
    sampling_ratio: int = 1,
) -> tuple[int, int]:
    """Returns (PY, PX), after looking at what all RoI operations are given.

    Raises:
      ValueError: naming the function: batches disagree, an empty map, or a size,
        stride or ratio that is not positive.
    """
    if len(rois) != len(x):
        raise ValueError(
            f"{function}: rois {rois.shape} (B, N, 4) are of another batch size than x {x.shape} "
            f"(B, Y, X, C); give each image its own, padded to one number"
        )
    if 0 in x.shape[1:3]:
        raise ValueError(f"{function}: x {x.shape} (B, Y, X, C) has no pixels to read")
    if not stride > 0:
        raise ValueError(
            f"{function}: stride={stride} must be positive, pixels of the image a pixel of x"
        )
    if sampling_ratio < 1:
        raise ValueError(
            f"{function}: sampling_ratio={sampling_ratio} must be at least 1; a number of samples "
            f"that grows with the RoI has no static shape"
        )
    return pair(function, "size", size)


def _between(places: Float[Array, "N R"], length: int) -> tuple[jax.Array, jax.Array]:
    """Of points along an axis the pixel before, and the weights (N, R, 2) of it and the next."""
    inside = (places >= -1) & (places <= length)
    places = jnp.clip(jnp.where(inside, places, 0), 0, length - 1)
    first = jnp.minimum(jnp.floor(places), max(0, length - 2))
    part = places - first
    weights = jnp.stack([1 - part, part], axis=-1) * inside[..., None]
    return first.astype(jnp.int32), weights
