"""Normalisation of activations."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float


def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    *,
    epsilon: float = 1e-6,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B D"]:
    """Mean zero and variance one along the last axis, then a gain and an offset.

    out = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias

    Of it nothing but x is kept for the backward pass, which computes it again: what it
    comes from is held anyway, and what it is made of would be several times its size.

    Args:
      x: mean and variance are taken over D, in float32 whatever the dtype.
      scale, bias: one value for each of D.
      epsilon: keeps constant rows finite.
      dtype: of the result; None is x's.

    Returns:
      An array of x's shape.

    Source: Ba et al. 2016, "Layer Normalization", equation 4 (arXiv:1607.06450).
    """
    return _layer_norm(x, scale, bias, epsilon, dtype or x.dtype)


def rms_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"],
    *,
    epsilon: float = 1e-6,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B D"]:
    """Mean square one along the last axis, then a gain.

    out = x / sqrt(mean(x^2) + epsilon) * scale

    Of it nothing but x is kept for the backward pass, as of `layer_norm`.

    Args:
      x, scale, epsilon, dtype: as of `layer_norm`.

    Returns:
      An array of x's shape.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4
    (arXiv:1910.07467).
    """
    return _rms_norm(x, scale, epsilon, dtype or x.dtype)


@partial(jax.checkpoint, static_argnums=(3, 4))
def _layer_norm(x, scale, bias, epsilon, dtype):
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + epsilon)
    return (y * channels(scale, x) + channels(bias, x)).astype(dtype)


@partial(jax.checkpoint, static_argnums=(2, 3))
def _rms_norm(x, scale, epsilon, dtype):
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + epsilon)
    return (y * channels(scale, x)).astype(dtype)


def channels(values: Float[Array, "C"], x: Float[Array, "*B C"]) -> Float[Array, "... C"]:
    """One value a channel, with as many axes as x has."""
    return jnp.expand_dims(values, range(x.ndim - 1))


def batch_norm(
    x: Float[Array, "*B C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    *,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "*B C"], Float[Array, "C"], Float[Array, "C"]]:
    """Mean zero and variance one of each channel over all that is not channels; gain and offset.

    out = (x - mean) / sqrt(var + epsilon) * scale + bias

    Of it x and the two statistics are kept for the backward pass, which reads x twice. It
    has no forward-mode derivative.

    Args:
      x: channels last; mean and variance are taken in float32 whatever the dtype.
      scale, bias: one value for each channel.
      epsilon: keeps constant channels finite.
      dtype: of the result; None is x's.

    Returns:
      An array of x's shape; the mean and the (biased) variance, through which no gradient
      flows.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1
    (arXiv:1502.03167).
    """
    return _batch_norm(x, scale, bias, epsilon, dtype or x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x, scale, bias, epsilon, dtype):
    return _batch_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _batch_norm_forward(x, scale, bias, epsilon, dtype):
    y, over = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean = y.mean(axis=over)
    # Not the mean of squared distances, which would read x once more.
    var = jnp.maximum(jnp.square(y).mean(axis=over) - jnp.square(mean), 0)
    root = lax.rsqrt(var + epsilon)
    out = (y - channels(mean, x)) * channels(root * scale, x) + channels(bias, x)
    return (out.astype(dtype), mean, var), (x, scale, bias, mean, root)


def _batch_norm_backward(epsilon, dtype, kept, cotangents):
    x, scale, bias, mean, root = kept
    # What is made of x alone is not made before there is a gradient.
    x, g = lax.optimization_barrier((x, cotangents[0]))
    g, over = g.astype(jnp.float32), tuple(range(x.ndim - 1))
    centred = x.astype(jnp.float32) - channels(mean, x)
    d_bias, d_scale = g.sum(axis=over), (g * centred).sum(axis=over) * root
    even = len(scale) / x.size
    dx = (g - channels(even * d_bias, x)) * channels(root * scale, x)
    dx = (dx - centred * channels(even * root * root * scale * d_scale, x)).astype(x.dtype)
    return dx, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def adaptive_layer_norm(
    x: Float[Array, "B T D"],
    shift: Float[Array, "B D"],
    scale: Float[Array, "B D"],
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "B T D"]:
    """Layer norm whose gain and offset are computed from a condition, one pair a sequence.

    out = (x - mean(x)) / sqrt(var(x) + epsilon) * (1 + scale) + shift

    Args:
      x: tokens; mean and variance are taken over D, in float32 whatever the dtype.
      shift, scale: the condition's; zero for a plain layer norm.
      epsilon: keeps constant tokens finite.

    Returns:
      An array of x's shape and dtype.

    Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers",
    section 3.2, "adaptive layer norm" (arXiv:2212.09748).
    """
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + epsilon)
    y = y * (1 + scale[:, None, :]) + shift[:, None, :]
    return y.astype(x.dtype)
