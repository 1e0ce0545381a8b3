"""Pictures between their pixels: bilinear sampling at any points."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.pixel_sums import pixel_sums

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
        weights = weights * scale.reshape(batch, -1)[:, :, None]
    row, column = jnp.moveaxis(corner.astype(jnp.int32) + 1, -1, 0)
    first = (jnp.arange(batch)[:, None] * framed.shape[1] + row) * framed.shape[2] + column
    out = pixel_sums(framed, first.reshape(-1, 1), weights.reshape(-1, 1, 4))
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


def _weights(part: Float[Array, "B N 2"]) -> Float[Array, "B N 4"]:
    """Of the four pixels around a point, row by row, from where it lies between them.

    Products one by one: the gradient of an outer one would sum over axes of two.
    """
    y, x = part[..., 0], part[..., 1]
    return jnp.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], axis=-1)


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
