"""Positions as fixed sine and cosine features."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
