"""Products of many small matrices, which XLA's CPU backend leaves to a single core.

It shares a batched product out among cores only if each matrix of the result is larger
than a tile, or if a reduction follows in the same kernel. So one follows here that
changes nothing. Transposed first factors are copied: a product that transposes while it
multiplies gets no such kernel and takes twice the time.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmodels.ops.platform import platform
from jaxmodels.ops.stored import stored

# Larger results are shared out anyway; less work is done sooner than shared out.
_LARGEST_RESULT, _LEAST_WORK = 1 << 16, 1 << 24


def batched_product(
    x: Float[Array, "*B M K"],
    y: Float[Array, "*B K N"],
    *,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "*B M N"]:
    """Products of matrices on all cores of a CPU; elsewhere `jnp.matmul`.

    out_bmn = sum_k x_bmk y_bkn

    Its gradient in reverse is of such products too; there is none in forward mode. An
    element that is not a number may make its whole row of the result so.

    Args:
      x, y: factors.
      preferred_element_type: of the result, as for `jnp.matmul`.

    Raises:
      ValueError: shapes disagree; leading axes are not broadcast.

    Source: the definition; the form was chosen by measurement (XLA of JAX 0.10.2).
    """
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-2]:
        raise ValueError(
            f"batched_product: x {x.shape} and y {y.shape} must be (*B, M, K) and (*B, K, N)"
        )
    return _product(preferred_element_type, x, y)


def transposed(x: Float[Array, "*B M K"]) -> Float[Array, "*B K M"]:
    """The transposed matrices as a copy, which XLA does not make part of a product."""
    return stored(x.swapaxes(-1, -2))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dtype, x, y):
    *batch, rows, inner = x.shape
    columns = y.shape[-1]
    work = math.prod(batch) * rows * inner * columns
    small = rows * columns <= _LARGEST_RESULT and work >= _LEAST_WORK
    if platform() != "cpu" or not small:
        return jnp.matmul(x, y, preferred_element_type=dtype)
    x, y = x.reshape(-1, rows, inner), y.reshape(-1, inner, columns)
    out = jnp.matmul(x, y, preferred_element_type=dtype)
    # Finite, so that an infinity stays one. A maximum of `out` and a row's minimum would do
    # as well, but XLA's kernel forgets in it what is not a number.
    out = out + 0.0 * jnp.tanh(jnp.max(out, axis=-1))[..., None]
    return out.reshape(*batch, rows, columns)


def _forward(dtype, x, y):
    return _product(dtype, x, y), (x, y)


def _backward(dtype, kept, d_out):
    x, y = kept
    d_x = batched_product(d_out, y.swapaxes(-1, -2))
    d_y = batched_product(transposed(x), d_out)
    return d_x.astype(x.dtype), d_y.astype(y.dtype)


_product.defvjp(_forward, _backward)
