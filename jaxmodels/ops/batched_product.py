"""Products of many small matrices, which XLA's CPU backend leaves to a single core.

It shares a batched product out among cores only if each matrix of the result is larger
than a tile, or if a reduction follows in the same kernel. So one follows here that
changes nothing. Transposed operands are copied: a product that transposes its first
factor gets no such kernel and takes twice the time.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmodels.ops.platform import platform

# Larger results are shared out anyway; less work is done sooner than shared out.
_LARGEST_RESULT, _LEAST_WORK = 1 << 16, 1 << 24


@jax.custom_vjp
def batched_product(x: Float[Array, "*B M K"], y: Float[Array, "*B K N"]) -> Float[Array, "*B M N"]:
    """Products of matrices, on all cores of a CPU; `x @ y` elsewhere.

    out_bmn = sum_k x_bmk y_bkn

    The gradient in reverse is defined, by products of the same kind. If an element of a
    matrix is not a number, all of that matrix are not.

    Source: the definition; the form was chosen by measurement (XLA of JAX 0.10.2).
    """
    *batch, rows, inner = x.shape
    columns = y.shape[-1]
    work = math.prod(batch) * rows * inner * columns
    small = rows * columns <= _LARGEST_RESULT and work >= _LEAST_WORK
    if platform() != "cpu" or not small or x.shape[:-2] != y.shape[:-2]:
        return jnp.matmul(x, y)
    out = jnp.matmul(x.reshape(-1, rows, inner), y.reshape(-1, inner, columns))
    out = jnp.maximum(out, jnp.min(out, axis=(1, 2), keepdims=True))
    return out.reshape(*batch, rows, columns)


def transposed(x: Float[Array, "*B M K"]) -> Float[Array, "*B K M"]:
    """The transposed matrices as a copy, which XLA does not make part of a product."""
    x = x.swapaxes(-1, -2)
    return lax.optimization_barrier(x) if platform() == "cpu" else x


def _forward(x, y):
    return batched_product(x, y), (x, y)


def _backward(kept, d_out):
    x, y = kept
    return batched_product(d_out, y.swapaxes(-1, -2)), batched_product(transposed(x), d_out)


batched_product.defvjp(_forward, _backward)
