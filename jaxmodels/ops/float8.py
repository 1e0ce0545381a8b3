"""Matrix products of eight-bit numbers, scaled tile by tile, for training.

One scale for a whole array would have to fit its largest element, and push small ones
below what eight bits tell from zero. Here every 128 elements along the axis that is
summed over have a scale of their own. All scales are powers of two, so that scaling
rounds nothing and what is scaled back is exact in bfloat16.

Whether a product is one of eight bits is asked for around a computation, as a mesh is,
by `training.make_step(precision="float8")`: a model knows nothing of it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TILE = 128
_DTYPE = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(_DTYPE).max)
# Smaller elements are zero next to it, and its inverse is finite.
_SMALLEST_SCALE = 2.0**-100

# `with float8_products(True):` asks for it. JAX knows of it, so that what was jitted before
# is traced again.
float8_products = jax.make_user_context(default_value=False)


def wanted(x: Array, kernel: Array) -> bool:
    """Whether the trace asks for eight bits in the product of these two.

    Layers that compute in float32 are left as they are.
    """
    return float8_products.value and x.dtype == kernel.dtype == jnp.bfloat16


def product(multiply: Callable[..., Array], x: Array, kernel: Array, *extra: Any) -> Array:
    """`multiply(x, kernel, *extra)`, by `float8_product` where it is wanted."""
    if wanted(x, kernel):
        return float8_product(multiply, x, kernel, *extra)
    return multiply(x, kernel, *extra)


def quantize(
    x: Float[Array, "*B M N"], tile: tuple[int, int]
) -> tuple[Float[Array, "*B M N"], Float[Array, "*B m n"]]:
    """Splits matrices into float8 numbers and a scale for each tile.

    x_ij = s_ab q_ij + rounding, with ij in tile ab and s_ab the smallest power of two for
    which all of its q are at most 448, the largest number of the format e4m3

    Args:
      x: of any floating-point dtype; an element that is not finite makes its tile NaN.
      tile: rows and columns of a tile. The last ones may be smaller.

    Returns:
      The numbers, in float8_e4m3fn, and the scales, in float32, one for each tile.

    Source: DeepSeek-AI 2024, "DeepSeek-V3", section 3.3.2 (arXiv:2412.19437), whose scales
    are powers of two for what the backward pass cuts into other tiles.
    """
    x = x.astype(jnp.float32)
    rows, columns = (-(-size // part) for size, part in zip(x.shape[-2:], tile, strict=True))
    beyond = (rows * tile[0] - x.shape[-2], columns * tile[1] - x.shape[-1])
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 2) + [(0, extra) for extra in beyond])
    tiles = padded.reshape(*x.shape[:-2], rows, tile[0], columns, tile[1])
    scales = _power_of_two(jnp.max(tiles, axis=(-3, -1)) / _LARGEST)
    return (x / _spread(scales, tile, x.shape)).astype(_DTYPE), scales


def dequantize(
    values: Float[Array, "*B M N"],
    scales: Float[Array, "*B m n"],
    tile: tuple[int, int],
    dtype: Any = jnp.float32,
) -> Float[Array, "*B M N"]:
    """The product of float8 numbers and their tiles' scales.

    Args:
      values, scales, tile: as `quantize` has them.
      dtype: of the result, in which float32 and bfloat16 hold it exactly below 2^127.

    Returns:
      An array of the shape of values.

    Source: as `quantize`.
    """
    wide = values.astype(jnp.float32) * _spread(scales, tile, values.shape)
    return wide.astype(dtype)


def _power_of_two(scales):
    """The next power of two, by the bits of the exponent."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(scales, _SMALLEST_SCALE), jnp.int32)
    mantissa = (1 << 23) - 1
    rounded = jax.lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)
    return jnp.where(jnp.isfinite(scales), rounded, jnp.nan)


def _spread(scales, tile, shape):
    """A tile's scale for each of its elements."""
    for axis in (-2, -1):
        wide = jnp.repeat(scales, tile[axis], axis=axis)
        scales = jax.lax.slice_in_dim(wide, 0, shape[axis], axis=axis % len(shape))
    return scales


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float8_product(
    multiply: Callable[..., Float[Array, "*B M F"]],
    x: Float[Array, "*B M D"],
    kernel: Float[Array, "*E D F"],
    *extra: Any,
) -> Float[Array, "*B M F"]:
    """A bilinear product whose operands, forward and backward, are eight-bit numbers.

    out = multiply(q(x), q(kernel));  dx = transposed(q(dout), q(kernel))
    dkernel = transposed(q'(q(x)), q'(dout))

    q rounds activations in tiles of 1 x 128 and kernels in tiles of 128 x 128; q' in tiles
    of 128 x 1, as the gradient of the kernel sums over tokens. For the backward pass each
    product keeps its x as eight bits. The products themselves are computed in x's dtype, in
    which each operand is exact: memory is gained on any device, and time where a compiler
    turns the product of scaled float8 numbers into one of the hardware's. Has no forward
    mode.

    Args:
      multiply: `(x, kernel, *extra) -> out`, linear in x and in kernel, with the sum over
        D and gradients that sum over F and over M.
      x: activations.
      kernel: weights.
      *extra: arrays that are not differentiated, such as the sizes of groups.

    Returns:
      What `multiply` gives.

    Source: DeepSeek-AI 2024, "DeepSeek-V3", sections 3.3.1 to 3.3.3, figures 6 and 7
    (arXiv:2412.19437). There only what is cut into other tiles has powers of two as scales,
    the input of the product after attention has more bits, and tokens travel to experts and
    moments are kept in fewer than float32, too.
    """
    return _forward(multiply, x, kernel, *extra)[0]


_ACTIVATION, _KERNEL, _TOKENS = (1, _TILE), (_TILE, _TILE), (_TILE, 1)


def _rounded(x, tile, dtype):
    return dequantize(*quantize(x, tile), tile, dtype)


def _forward(multiply, x, kernel, *extra):
    kept = quantize(x, _ACTIVATION)
    x = dequantize(*kept, _ACTIVATION, x.dtype)
    return multiply(x, _rounded(kernel, _KERNEL, kernel.dtype), *extra), (kept, kernel, extra)


def _backward(multiply, residuals, cotangent):
    kept, kernel, extra = residuals
    dtype = cotangent.dtype
    x = dequantize(*kept, _ACTIVATION, dtype)
    rounded = _rounded(kernel, _KERNEL, kernel.dtype)
    of_x = jax.linear_transpose(lambda x: multiply(x, rounded, *extra), x)
    again = _rounded(x, _TOKENS, dtype)
    of_kernel = jax.linear_transpose(lambda kernel: multiply(again, kernel, *extra), kernel)
    (dx,) = of_x(_rounded(cotangent, _ACTIVATION, dtype))
    (dkernel,) = of_kernel(_rounded(cotangent, _TOKENS, dtype))
    return dx, dkernel, *[None] * len(extra)


float8_product.defvjp(_forward, _backward)
