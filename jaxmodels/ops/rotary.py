"""Rotary positions: pairs of channels turned by an angle that grows with the position."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

LAYOUTS = ("half", "interleaved")


def rotary_frequencies(width: int, base: float = 10_000.0) -> Float[Array, "N"]:
    """Radians that each pair of channels turns per position, from fast to slow.

    w_i = base^(-2 i / width),   i = 0 ... width / 2 - 1

    Args:
      width: how many channels turn, 2 N.
      base: the slowest pair turns almost `base` times slower than the fastest.

    Raises:
      ValueError: width is not a positive even number, or base is not positive.

    Source: Su et al. 2021, "RoFormer", section 3.2 (arXiv:2104.09864).
    """
    if width < 2 or width % 2:
        raise ValueError(
            f"rotary_frequencies: width={width} cannot be split into pairs of channels; "
            f"pass a positive even number"
        )
    if base <= 0:
        raise ValueError(f"rotary_frequencies: base={base} must be positive")
    return jnp.asarray(base ** (-np.arange(0, width, 2) / width), jnp.float32)


def rotary_angles(
    positions: Real[Array, "*B T"], frequencies: Float[Array, "*#C N"]
) -> Float[Array, "*B T N"]:
    """The angle of each pair at each position, m w_i, in float32.

    Args:
      positions: of the tokens; fractions and negative numbers are positions too.
      frequencies: (N,), or (*B, T, N) where they differ between tokens.

    Source: Su et al. 2021, equation 15 (arXiv:2104.09864).
    """
    return positions.astype(jnp.float32)[..., None] * _aligned(frequencies, positions.ndim + 1)


def axial_angles(
    positions: Real[Array, "*B T A"], frequencies: Float[Array, "N"]
) -> Float[Array, "*B T M"]:
    """Angles of places with several coordinates, such as (row, column): M = A N.

    The first N pairs turn with the first coordinate, the next N with the second,
    and so on, all at the same frequencies. For pictures and heads of width K,
    take `rotary_frequencies(K // 2)`.

    Args:
      positions: A coordinates a token.
      frequencies: of one coordinate.

    Source: the two-dimensional case of Su et al. 2021 (arXiv:2104.09864), as in
    the vision tower of Wang et al. 2024, "Qwen2-VL", section 2.1 (arXiv:2409.12191).
    """
    angles = positions.astype(jnp.float32)[..., None] * _aligned(frequencies, positions.ndim + 1)
    return angles.reshape(*positions.shape[:-1], -1)


def multimodal_angles(
    positions: Real[Array, "*B T A"], frequencies: Float[Array, "N"], sections: tuple[int, ...]
) -> Float[Array, "*B T N"]:
    """Angles where each range of frequencies belongs to one coordinate (M-RoPE).

    angle_i = m_a w_i,   a = the section that i lies in

    With all coordinates equal, as for text, this is ordinary rotary.

    Args:
      positions: A coordinates a token: (time, row, column) in Qwen2-VL.
      frequencies: as for one coordinate.
      sections: how many frequencies each coordinate has, in order; the sum is N.

    Raises:
      ValueError: there are more or fewer sections than coordinates, or they do not
        add up to N.

    Source: Wang et al. 2024, "Qwen2-VL", section 2.1 (arXiv:2409.12191).
    """
    if len(sections) != positions.shape[-1] or sum(sections) != len(frequencies):
        raise ValueError(
            f"multimodal_angles: sections={sections} must be one number for each of the "
            f"{positions.shape[-1]} coordinates of positions {positions.shape}, and add up to "
            f"the {len(frequencies)} frequencies"
        )
    coordinate = np.repeat(np.arange(len(sections)), sections)
    places = positions.astype(jnp.float32)[..., coordinate]
    return places * _aligned(frequencies, positions.ndim)


def rotate(
    x: Float[Array, "*B T H K"],
    angles: Float[Array, "*#B T N"],
    *,
    layout: str = "half",
    magnitude: float | Float[Array, "*#B T N"] = 1.0,
) -> Float[Array, "*B T H K"]:
    """Turns the first 2 N channels pair by pair; the others stay as they are.

    (a_i, b_i) -> magnitude (a_i cos - b_i sin, b_i cos + a_i sin)

    The product of a query turned by m w and a key turned by n w depends on m - n
    only. Partial rotary is N < K / 2.

    Args:
      x: queries or keys.
      angles: of the pairs, the same for all heads.
      layout: how channels pair up: "half" is (i, i + N), as in Llama and GPT-NeoX;
        "interleaved" is (2 i, 2 i + 1), as in RoFormer and GPT-J.
      magnitude: factor on the turned channels (YaRN's attention factor), or one
        for each pair (xPos).

    Returns:
      The turned array, in x's dtype; computed in float32.

    Raises:
      ValueError: unknown layout, or more angles than pairs of channels.

    Source: Su et al. 2021, "RoFormer", equations 14 and 34 (arXiv:2104.09864).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"rotate: layout={layout!r} is none of {LAYOUTS}")
    pairs = angles.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(
            f"rotate: {pairs} angles turn {2 * pairs} channels, and x {x.shape} has only "
            f"{x.shape[-1]}; compute the frequencies of a smaller width"
        )
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    # In float32, as the angles are, whatever x is.
    cos, sin = ((magnitude * wave(angles))[..., None, :] for wave in (jnp.cos, jnp.sin))
    if layout == "half":
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def xpos_scales(
    positions: Real[Array, "*B T"], width: int, *, scale_base: float = 512.0
) -> Float[Array, "*B T N"]:
    """Factor on each pair of channels that makes rotary logits fade with distance (xPos).

    s_i(m) = ((2 i / width + 0.4) / 1.4)^(m / scale_base)

    The `magnitude` of `rotate`: s_i(m) for a query at m and s_i(-n) for a key at n,
    so that their product fades by s_i(m - n). As only differences of positions
    matter, subtract the middle of a long range beforehand: powers of tens of
    thousands overflow in float32.

    Args:
      positions: of the tokens.
      width: how many channels turn, 2 N.
      scale_base: distance over which the fastest pair fades by 0.4 / 1.4.

    Source: Sun et al. 2022, "A Length-Extrapolatable Transformer", section 3.2 and
    algorithm 1 (arXiv:2212.10554).
    """
    ratio = (np.arange(0, width, 2) / width + 0.4) / 1.4
    exponents = jnp.asarray(np.log(ratio) / scale_base, jnp.float32)
    return jnp.exp(rotary_angles(positions, exponents))


def _aligned(x: Array, ndim: int) -> Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
