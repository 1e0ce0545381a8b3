"""Positions as fixed sine and cosine features."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

_LONGEST_WAVE = 10_000.0


def sincos_positions_2d(rows: int, columns: int, width: int) -> Float[Array, "N D"]:
    """Fixed position table of a grid of patches, row by row.

    table[(y, x)] = [sin(x w), cos(x w), sin(y w), cos(y w)],  w_i = 10000^(-4 i / D)

    The column comes first, as in the published code. Computed once in float64
    while tracing, so it is a constant of the compiled program.

    Args:
      rows, columns: size of the grid in patches.
      width: D, the width of a token.

    Returns:
      One float32 row for each of the N = rows * columns patches.

    Raises:
      ValueError: width is not a positive multiple of four.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners",
    appendix A.1 (arXiv:2111.06377); used by Peebles and Xie 2023, "Scalable
    Diffusion Models with Transformers", section 3.2 (arXiv:2212.09748).
    """
    if width < 4 or width % 4:
        raise ValueError(
            f"sincos_positions_2d: width={width} cannot be split into sine and cosine of "
            f"row and column; pass a multiple of 4"
        )
    frequencies = _LONGEST_WAVE ** (-np.arange(width // 4) / (width // 4))
    y, x = np.divmod(np.arange(rows * columns), columns)
    waves = [wave(np.outer(p, frequencies)) for p in (x, y) for wave in (np.sin, np.cos)]
    return jnp.asarray(np.concatenate(waves, axis=1), jnp.float32)


def sincos_positions(positions: Real[Array, "*B T"], width: int) -> Float[Array, "*B T D"]:
    """Fixed features of places in a sequence, sines and cosines in turn.

    out_2i = sin(m w_i),   out_2i+1 = cos(m w_i),   w_i = 10000^(-2 i / D)

    Args:
      positions: m.
      width: D, the width of a token.

    Returns:
      Features in float32.

    Raises:
      ValueError: width is not a positive even number.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5
    (arXiv:1706.03762).
    """
    if width < 2 or width % 2:
        raise ValueError(
            f"sincos_positions: width={width} is not a positive even number; every frequency "
            f"needs a sine and a cosine"
        )
    frequencies = _LONGEST_WAVE ** (-np.arange(0, width, 2) / width)
    frequencies = jnp.asarray(frequencies, jnp.float32).reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves.reshape(*positions.shape, width)


def sincos_timesteps(timesteps: Float[Array, "B"], width: int) -> Float[Array, "B D"]:
    """Features of a scalar: cosines and sines from fast to slow.

    out = [cos(t w), sin(t w)],  w_i = 10000^(-i / (D/2 - 1))

    Args:
      timesteps: expected to span about [0, 1000]; below one only the fastest
        waves move.
      width: D, the number of features.

    Returns:
      Features in float32, whatever the input, because bfloat16 cannot tell
      neighbouring timesteps apart.

    Raises:
      ValueError: width is odd or below four.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"
    (arXiv:2006.11239); cosines first and D/2 - 1 as in `diffusers`.
    """
    if width < 4 or width % 2:
        raise ValueError(
            f"sincos_timesteps: width={width} is not an even number of at least 4; "
            f"every frequency needs a cosine and a sine"
        )
    half = width // 2
    frequencies = jnp.asarray(_LONGEST_WAVE ** (-np.arange(half) / (half - 1)), jnp.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
