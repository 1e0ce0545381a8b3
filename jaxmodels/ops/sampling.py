"""Pictures between their pixels: bilinear sampling at any points."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.platform import platform

PADDING_MODES = ("zeros", "border", "reflection", "symmetric")


def bilinear_sample(
    x: Float[Array, "B Y X C"],
    points: Float[Array, "*N 2"],
    *,
    scale: Float[Array, "..."] | None = None,
    padding_mode: str = "zeros",
) -> Float[Array, "*N C"]:
    """Reads images at points between their pixels.

    out = scale sum_(i, j) max(0, 1 - |py - i|) max(0, 1 - |px - j|) x[i, j]

    Four pixels at most have a weight above zero. Time and memory O(N C). The
    gradient adds every point's cotangent to its four pixels; on a CPU that is a
    loop over points, five times faster than a scatter of XLA's. Reverse mode
    only.

    Args:
      x: images.
      points: (B, ..., 2), of each image its own: (px, py) in pixels, where
        (0, 0) is the centre of the first one.
      scale: (B, ...), a factor for each point; None is 1. It joins the weights
        of the pixels, which is cheaper than a product with the result.
      padding_mode: what lies outside the image. "zeros": pixels of zeros, so it
        fades within one pixel. "border": the nearest pixel goes on. The image
        mirrored over and over: "reflection" about the centres of its outermost
        pixels, which are not repeated; "symmetric" about their outer edges.

    Returns:
      A vector of channels for each point, in x's dtype.

    Raises:
      ValueError: shapes disagree, the image is empty, or an unknown mode.

    Source: Jaderberg et al. 2015, "Spatial Transformer Networks", equation 5
    (arXiv:1506.02025).
    """
    batch, rows, columns, channels = x.shape
    _check(x, points, padding_mode)
    places = points.reshape(batch, -1, 2)[..., ::-1].astype(jnp.promote_types(x.dtype, jnp.float32))
    sizes = jnp.array([rows, columns], places.dtype)[None, None]
    places = _into_image(places, sizes, padding_mode)
    # A frame of zeros: corners of any point lie inside, and need no test of their own.
    framed = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
    corner = jnp.floor(places)
    weights = _weights(places - corner)
    if scale is not None:
        require_shape("bilinear_sample", "scale", scale, points.shape[:-1], "one for each point")
        weights = weights * scale.reshape(batch, -1)[:, :, None, None]
    out = _combine(framed, corner.astype(jnp.int32) + 1, weights)
    return out.reshape(*points.shape[:-1], channels)


def grid_sample(
    x: Float[Array, "B Y X C"],
    grid: Float[Array, "*N 2"],
    *,
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Float[Array, "*N C"]:
    """`bilinear_sample` at coordinates from -1 to 1, as `torch.nn.functional.grid_sample`.

    Args:
      x: images.
      grid: (B, ..., 2): (gx, gy), of which -1 and 1 are the two ends of the image.
      padding_mode: what lies outside; "reflection" mirrors about the ends.
      align_corners: the ends are the centres of the outermost pixels if True,
        their outer edges if False.

    Returns, Raises: as `bilinear_sample`.
    """
    points = pixel_coordinates(grid, x.shape[1:3], align_corners=align_corners)
    mirrored = "reflection" if align_corners else "symmetric"
    mode = mirrored if padding_mode == "reflection" else padding_mode
    return bilinear_sample(x, points, padding_mode=mode)


def pixel_coordinates(
    grid: Float[Array, "*N 2"], image_size: tuple[int, int], *, align_corners: bool
) -> Float[Array, "*N 2"]:
    """Turns coordinates from -1 to 1 into pixels.

    p = (g + 1) (n - 1) / 2 if align_corners, else ((g + 1) n - 1) / 2

    Args:
      grid: (gx, gy).
      image_size: (Y, X) of the image.
      align_corners: as in `grid_sample`.

    Returns:
      (px, py) for `bilinear_sample`.
    """
    sizes = jnp.array(image_size[::-1], grid.dtype).reshape((1,) * (grid.ndim - 1) + (2,))
    return (grid + 1) * (sizes - 1) / 2 if align_corners else ((grid + 1) * sizes - 1) / 2


def _into_image(
    places: Float[Array, "B N 2"], sizes: Float[Array, "1 1 2"], mode: str
) -> Float[Array, "B N 2"]:
    """Moves points from outside to where the image, with its frame of zeros, has their value."""
    last = sizes - 1
    if mode == "zeros":
        return jnp.clip(places, -1, sizes)
    if mode == "reflection":
        # A mirrored image comes again every 2 last; a single pixel is its own mirror image.
        places = last - jnp.abs(jnp.abs(places) % jnp.maximum(2 * last, 1) - last)
    elif mode == "symmetric":
        places = sizes - jnp.abs(jnp.abs(places + 0.5) % (2 * sizes) - sizes) - 0.5
    return jnp.clip(places, 0, last)


def _weights(part: Float[Array, "B N 2"]) -> Float[Array, "B N 2 2"]:
    """Of the four pixels around a point, by row and column, from where it lies between them."""
    y, x = (jnp.stack([1 - part[..., axis], part[..., axis]], axis=-1) for axis in (0, 1))
    return y[..., :, None] * x[..., None, :]


@jax.custom_vjp
def _combine(
    x: Float[Array, "B Y X C"], corner: Int[Array, "B N 2"], weights: Float[Array, "B N 2 2"]
) -> Float[Array, "B N C"]:
    """Weighted sums of the two by two pixels that start at (row, column) `corner`."""

    def read(places):
        corner, weights = places
        terms = [
            weights[..., i, j, None] * pixel
            for i, row in enumerate(_corners(x, corner))
            for j, pixel in enumerate(row)
        ]
        return sum(terms[1:], start=terms[0]).astype(x.dtype)

    batch, count, _ = corner.shape
    pieces = next((n for n in (2, 3, 5, 7) if count % n == 0), 1)
    if platform() != "cpu" or pieces == 1:
        return read((corner, weights))
    # A loop is what XLA does not fuse over. Fused with a caller's reshape, such as that of
    # taps for a matrix product, it would divide for every channel's address: 20 times slower.
    cut = [
        jnp.moveaxis(p.reshape(batch, pieces, -1, *p.shape[2:]), 1, 0) for p in (corner, weights)
    ]
    return jnp.moveaxis(lax.map(read, cut), 0, 1).reshape(batch, count, -1)


def _corners(x: jax.Array, corner: jax.Array) -> list[list[jax.Array]]:
    """The pixels around each point as rows of channels, which are one piece of memory each."""
    batch, rows, columns, channels = x.shape
    flat = x.reshape(-1, channels)
    first = (jnp.arange(batch)[:, None] * rows + corner[..., 0]) * columns + corner[..., 1]
    return [
        [flat.at[first + i * columns + j].get(mode="promise_in_bounds") for j in (0, 1)]
        for i in (0, 1)
    ]


def _forward(x, corner, weights):
    return _combine(x, corner, weights), (x, corner, weights)


def _backward(residuals, cotangent):
    x, corner, weights = residuals
    # By matrix products, because a reduction would be fused with the gather, as above.
    ones = jnp.ones(x.shape[-1:], x.dtype)
    along = partial(jnp.matmul, b=ones, preferred_element_type=weights.dtype)
    of_weights = [[along(cotangent * pixel) for pixel in row] for row in _corners(x, corner)]
    of_weights = jnp.stack([jnp.stack(row, axis=-1) for row in of_weights], axis=-2)
    spread = _spread_in_loop if platform() == "cpu" else _spread_at_once
    return spread(cotangent, corner, weights, x.shape).astype(x.dtype), None, of_weights


_combine.defvjp(_forward, _backward)


def _spread_in_loop(values, corner, weights, shape) -> jax.Array:
    """The transpose of `_combine`, a point after the other."""
    batch, rows, columns, channels = shape
    tops = jnp.arange(batch)[:, None] * rows + corner[..., 0]
    places = jnp.stack([tops, corner[..., 1]], axis=-1).reshape(-1, 2)
    values, weights = values.reshape(-1, channels), weights.reshape(-1, 2, 2)

    def add(n, image):
        start = (places[n, 0], places[n, 1], 0)
        here = lax.dynamic_slice(image, start, (2, 2, channels))
        more = values[n][None, None] * weights[n][..., None]
        return lax.dynamic_update_slice(image, here + more, start)

    empty = jnp.zeros((batch * rows, columns, channels), weights.dtype)
    return lax.fori_loop(0, len(values), add, empty).reshape(shape)


def _spread_at_once(values, corner, weights, shape) -> jax.Array:
    """The transpose of `_combine` as one scatter, for accelerators."""
    near = jnp.arange(2)
    images = jnp.arange(shape[0])[:, None, None, None]
    rows = corner[..., 0][:, :, None, None] + near[None, None, :, None]
    columns = corner[..., 1][:, :, None, None] + near[None, None, None, :]
    weighted = values[:, :, None, None] * weights[..., None]
    return jnp.zeros(shape, weights.dtype).at[images, rows, columns].add(weighted)


def _check(x: jax.Array, points: jax.Array, mode: str) -> None:
    if points.shape[0] != x.shape[0]:
        raise ValueError(
            f"bilinear_sample: points {points.shape} (B, ..., 2) are of another batch size than "
            f"x {x.shape} (B, Y, X, C); give each image its own, by jnp.broadcast_to if need be"
        )
    if 0 in x.shape[1:3]:
        raise ValueError(f"bilinear_sample: x {x.shape} (B, Y, X, C) has no pixels to read")
    if mode not in PADDING_MODES:
        raise ValueError(
            f"bilinear_sample: unknown padding_mode {mode!r}; pass one of {PADDING_MODES}"
        )
