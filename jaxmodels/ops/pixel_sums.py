"""Weighted sums of pixels, two by two: what every reading between the pixels comes down to."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops.platform import platform
from jaxmodels.ops.stored import stored

# Channels that are summed side by side in the gradient of the weights.
_LANES = 32


@jax.custom_vjp
def pixel_sums(
    x: Float[Array, "I Y X C"], corners: Int[Array, "N S"], weights: Float[Array, "N S 4"]
) -> Float[Array, "N C"]:
    """Sums over S groups of two by two pixels, each pixel with a weight of its own.

    out_n = sum_(s, i, j) weights_(n, s, 2 i + j) x_flat[corners_ns + i X + j]

    Time O(N S C), and no memory but the result's. The gradient of x adds every
    cotangent to the pixels it came from; on a CPU that is a loop over all N S,
    several times faster than a scatter of XLA's. Reverse mode only.

    Args:
      x: images of two by two pixels at the least; x_flat are their pixels in a row.
      corners: the first pixel of each group, in the last row or column of none; not checked.
      weights: of float32 at the least.

    Returns:
      Sums in x's dtype.
    """
    flat, near = x.reshape(-1, x.shape[-1]), _near(x.shape[2])
    out = 0
    for s in range(corners.shape[1]):
        corner = stored(corners[:, s])
        for n in range(4):
            pixel = flat.at[corner + near[n]].get(mode="promise_in_bounds")
            out = out + weights[:, s, n, None] * pixel
    # Joined with a caller's reshape, such as that of taps for a matrix product, it would
    # divide for every channel's address: 20 times slower.
    return stored(out.astype(x.dtype))


def _near(columns: int) -> tuple[int, ...]:
    """How far after the first pixel of a group its four are."""
    return (0, 1, columns, columns + 1)


def _forward(x, corners, weights):
    return pixel_sums(x, corners, weights), (x, corners, weights)


def _backward(residuals, cotangent):
    x, corners, weights = residuals
    cotangent, channels = cotangent.astype(weights.dtype), x.shape[-1]
    lanes = _LANES if platform() == "cpu" and channels % _LANES == 0 else channels

    def of_weights(corner):
        # The sum over channels, a few vectors of them first: XLA vectorises no sum along
        # the last axis, but a product of matrices, whose operand should be small.
        places = stored(corner)[:, None] + jnp.array(_near(x.shape[2]))[None]
        pixels = x.reshape(-1, channels).at[places].get(mode="promise_in_bounds")
        shares = cotangent[:, None] * pixels
        shares = sum(shares[..., n : n + lanes] for n in range(0, channels, lanes))
        return stored(shares) @ jnp.ones(lanes, weights.dtype)

    spread = _spread_in_loop if platform() == "cpu" else _spread_at_once
    of_x = spread(cotangent, corners, weights, x.shape).astype(x.dtype)
    return of_x, None, jnp.moveaxis(lax.map(of_weights, corners.T), 0, 1)


pixel_sums.defvjp(_forward, _backward)


def _spread_in_loop(values, corners, weights, shape) -> jax.Array:
    """The transpose of `pixel_sums`, one group after the other."""
    images, rows, columns, channels = shape
    groups, corners = corners.shape[1], corners.reshape(-1)
    tops, lefts = corners // columns, corners % columns
    weights = weights.reshape(-1, 2, 2)

    def add(n, image):
        start = (tops[n], lefts[n], 0)
        here = lax.dynamic_slice(image, start, (2, 2, channels))
        more = weights[n][..., None] * values[n // groups][None, None]
        return lax.dynamic_update_slice(image, here + more, start)

    empty = jnp.zeros((images * rows, columns, channels), weights.dtype)
    return lax.fori_loop(0, len(corners), add, empty).reshape(shape)


def _spread_at_once(values, corners, weights, shape) -> jax.Array:
    """The transpose of `pixel_sums` as one scatter, for accelerators."""
    weighted = weights[..., None] * values[:, None, None]
    flat = jnp.zeros((shape[0] * shape[1] * shape[2], shape[3]), weights.dtype)
    places = corners[..., None] + jnp.array(_near(shape[2]))[None, None]
    return flat.at[places].add(weighted, mode="promise_in_bounds").reshape(shape)
