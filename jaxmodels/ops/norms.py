"""Normalisation of activations."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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
