"""What RoI operations that interpolate share: where bins are sampled, and the reading."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.platform import platform
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
    corners, weights = corners.reshape(count, ratio**2), weights.reshape(count, ratio**2, 2, 2)
    return _combine(x, corners, weights).reshape(*images.shape, channels)


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


@jax.custom_vjp
def _combine(
    x: Float[Array, "I Y X C"], corners: Int[Array, "N S"], weights: Float[Array, "N S 2 2"]
) -> Float[Array, "N C"]:
    """Sums over S of two by two pixels that start at `corners`, counted through all images."""

    def read(places):
        corners, weights = places
        out = 0
        for s in range(corners.shape[1]):
            for (i, j), pixel in _pixels(x, corners[:, s]):
                out = out + weights[:, s, i, j, None] * pixel
        return out.astype(x.dtype)

    pieces = next((n for n in (2, 3, 5, 7) if len(corners) % n == 0), 1)
    if platform() != "cpu" or pieces == 1:
        return read((corners, weights))
    # A loop is what XLA does not fuse over. Fused with a caller's reshape, such as that
    # for a dense layer, the read would divide for every channel's address: 10 times slower.
    cut = [p.reshape(pieces, len(p) // pieces, *p.shape[1:]) for p in (corners, weights)]
    return lax.map(read, cut).reshape(len(corners), x.shape[-1])


def _pixels(x: jax.Array, corner: Int[Array, "N"]):
    """The four pixels from `corner` on by (row, column), as rows of channels."""
    flat = x.reshape(-1, x.shape[-1])
    for i in (0, 1):
        for j in (0, 1):
            place = corner + i * x.shape[2] + j
            yield (i, j), flat.at[place].get(mode="promise_in_bounds")


def _forward(x, corners, weights):
    return _combine(x, corners, weights), (x, corners, weights)


def _backward(residuals, cotangent):
    x, corners, weights = residuals
    cotangent = cotangent.astype(weights.dtype)
    # By a matrix product, because a reduction would be fused with the gather, as above.
    ones = jnp.ones(x.shape[-1:], weights.dtype)

    def of_weights(corner):
        four = [(cotangent * pixel) @ ones for _, pixel in _pixels(x, corner)]
        return jnp.stack(four, axis=-1).reshape(-1, 2, 2)

    spread = _spread_in_loop if platform() == "cpu" else _spread_at_once
    of_x = spread(cotangent, corners, weights, x.shape).astype(x.dtype)
    return of_x, None, jnp.moveaxis(lax.map(of_weights, corners.T), 0, 1)


_combine.defvjp(_forward, _backward)


def _spread_in_loop(values, corners, weights, shape) -> jax.Array:
    """The transpose of `_combine`, a point after the other."""
    images, rows, columns, channels = shape
    samples, corners = corners.shape[1], corners.reshape(-1)
    tops, lefts = corners // columns, corners % columns
    weights = weights.reshape(-1, 2, 2)

    def add(n, image):
        start = (tops[n], lefts[n], 0)
        here = lax.dynamic_slice(image, start, (2, 2, channels))
        more = weights[n][..., None] * values[n // samples][None, None]
        return lax.dynamic_update_slice(image, here + more, start)

    empty = jnp.zeros((images * rows, columns, channels), weights.dtype)
    return lax.fori_loop(0, len(corners), add, empty).reshape(shape)


def _spread_at_once(values, corners, weights, shape) -> jax.Array:
    """The transpose of `_combine` as one scatter, for accelerators."""
    near = jnp.arange(2)[:, None] * shape[2] + jnp.arange(2)[None, :]
    places = corners[:, :, None, None] + near[None, None]
    weighted = weights[..., None] * values[:, None, None, None]
    flat = jnp.zeros((shape[0] * shape[1] * shape[2], shape[3]), weights.dtype)
    return flat.at[places].add(weighted, mode="promise_in_bounds").reshape(shape)
