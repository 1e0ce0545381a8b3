"""Images in other sizes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodels.ops.windows import Pair, pair

METHODS = ("nearest", "bilinear", "bicubic")
# Keys's cubic: torch interpolates with one slope and, as Pillow, filters with the other.
_CUBIC_SLOPE, _FILTER_SLOPE = -0.75, -0.5


def resize(
    x: Float[Array, "B Y X C"],
    size: Pair,
    *,
    method: str = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
) -> Float[Array, "B V U C"]:
    """Images of another size, as `torch.nn.functional.interpolate` makes them.

    out[v, u] = sum_(y, x) R[v, y] S[u, x] in[y, x]

    R and S hold the weights of a method along one axis: two small matrix
    products, O(V Y X C + V U X C), whose transposes are the gradient. "nearest"
    picks rows and columns instead.

    Args:
      x: images.
      size: (V, U) of the result in pixels, or one number for both.
      method: "nearest", "bilinear" or "bicubic" (Keys's cubic with slope -3/4).
      align_corners: False scales the area, edges on edges; True puts the centres
        of the corner pixels on each other.
      antialias: widens the weights to what one pixel of the result covers where
        it shrinks, and lets them end at the border; "bicubic" then has slope -1/2.
        It is what Pillow does.

    Returns:
      The resized images, in x's dtype; weighed in float32 or wider.

    Raises:
      ValueError: size below 1, an empty image, an unknown method, or options
        that it does not have.

    Source: Keys 1981, "Cubic Convolution Interpolation for Digital Image
    Processing", equation 4.
    """
    size = pair("resize", "size", size)
    _check(x.shape, method, align_corners, antialias)
    if method == "nearest":
        rows, columns = (_nearest(n, m) for n, m in zip(x.shape[1:3], size, strict=True))
        return x[:, rows][:, :, columns]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    weights = _filter if antialias else _interpolation
    down, across = (
        jnp.asarray(weights(n, m, method, align_corners), dtype)
        for n, m in zip(x.shape[1:3], size, strict=True)
    )
    # Weights rounded to bfloat16, as some accelerators do, would show as stripes.
    out = jnp.einsum("vy,byxc->bvxc", down, x.astype(dtype), precision="highest")
    return jnp.einsum("ux,bvxc->bvuc", across, out, precision="highest").astype(x.dtype)


def _nearest(size: int, new_size: int) -> np.ndarray:
    """In float32, because rounding decides which of two equally near pixels torch takes."""
    step = np.float32(size) / np.float32(new_size)
    found = np.floor(np.arange(new_size, dtype=np.float32) * step)
    return np.minimum(found.astype(np.int32), size - 1)


def _interpolation(size: int, new_size: int, method: str, align_corners: bool) -> np.ndarray:
    """(new_size, size): weights of the two or four nearest pixels; the border pixel goes on."""
    new = np.arange(new_size)
    if align_corners:
        places = new * ((size - 1) / max(new_size - 1, 1))
    else:
        places = (new + 0.5) * (size / new_size) - 0.5
    taps = np.floor(places)[:, None] + np.arange(-1, 3)[None, :]
    weights = _kernel(places[:, None] - taps, method, _CUBIC_SLOPE)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (new[:, None], np.clip(taps, 0, size - 1).astype(int)), weights)
    return matrix


def _filter(size: int, new_size: int, method: str, align_corners: bool) -> np.ndarray:
    """(new_size, size): weights of all pixels that the kernel, as wide as a new pixel, covers."""
    del align_corners  # False, or `_check` had refused
    step = size / new_size
    centres = (np.arange(new_size) + 0.5) * step - 0.5
    distances = (centres[:, None] - np.arange(size)[None, :]) / max(step, 1)
    weights = _kernel(distances, method, _FILTER_SLOPE)
    return weights / weights.sum(axis=1, keepdims=True)


def _kernel(distance: np.ndarray, method: str, slope: float) -> np.ndarray:
    """The weight at a distance in pixels."""
    d = np.abs(distance)
    if method == "bilinear":
        return np.maximum(0, 1 - d)
    near = (slope + 2) * d**3 - (slope + 3) * d**2 + 1
    far = slope * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def _check(shape: tuple[int, ...], method: str, align_corners: bool, antialias: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"resize: unknown method {method!r}; pass one of {METHODS}")
    if 0 in shape[1:3]:
        raise ValueError(f"resize: x {shape} (B, Y, X, C) has no pixels")
    if method == "nearest" and (align_corners or antialias):
        raise ValueError(
            f"resize: method='nearest' has neither align_corners={align_corners} nor "
            f"antialias={antialias}; leave both False or pass 'bilinear'"
        )
    if align_corners and antialias:
        raise ValueError("resize: align_corners=True contradicts antialias=True; pass one of them")
