"""Rotary frequencies for contexts longer than those of training, and log-n scaling.

None of these needs other parameters: a model trained with plain rotary positions
takes any of them when it is evaluated.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxmodels.ops.rotary import rotary_frequencies


def interpolated_frequencies(width: int, base: float, *, factor: float) -> Float[Array, "N"]:
    """Position interpolation: every pair turns `factor` times slower.

    w_i / factor, which is the same as positions divided by factor.

    Args:
      width, base: as in `rotary_frequencies`.
      factor: wanted length over trained length, at least 1.

    Raises:
      ValueError: factor is less than 1.

    Source: Chen et al. 2023, "Extending Context Window of Large Language Models via
    Positional Interpolation", equation 4 (arXiv:2306.15595).
    """
    _check_factor("interpolated_frequencies", factor)
    return rotary_frequencies(width, base) / factor


def ntk_frequencies(width: int, base: float, *, factor: float) -> Float[Array, "N"]:
    """NTK-aware scaling: the slowest pair is interpolated, the fastest untouched.

    w_i = (base factor^(width / (width - 2)))^(-2 i / width)

    Args:
      width, base: as in `rotary_frequencies`; width is at least 4.
      factor: wanted length over trained length, at least 1.

    Raises:
      ValueError: factor is less than 1, or width is less than 4.

    Source: bloc97 2023, "NTK-Aware Scaled RoPE", as written down in Peng et al.
    2023, "YaRN", definition 1 (arXiv:2309.00071).
    """
    _check_factor("ntk_frequencies", factor)
    return rotary_frequencies(width, base) * _ntk_slowing("ntk_frequencies", width, factor)


def dynamic_ntk_frequencies(
    lengths: Int[Array, "*B"],
    width: int,
    base: float,
    *,
    train_length: int,
    factor: float = 1.0,
) -> Float[Array, "*B N"]:
    """NTK-aware scaling by as much as the length so far asks for.

    The factor of `ntk_frequencies` is s = factor length / train_length - (factor - 1),
    and 1 up to train_length.

    Args:
      lengths: tokens of each sequence so far; any number of them.
      width, base: as in `rotary_frequencies`; width is at least 4.
      train_length: up to which nothing changes.
      factor: how fast the scale grows with the length, at least 1.

    Returns:
      Frequencies for each of `lengths`.

    Raises:
      ValueError: factor is less than 1, or width is less than 4.

    Source: emozilla 2023, "Dynamically Scaled RoPE", and Peng et al. 2023, "YaRN",
    section 3.3 (arXiv:2309.00071); factor as in `transformers`.
    """
    _check_factor("dynamic_ntk_frequencies", factor)
    over = jnp.maximum(lengths.astype(jnp.float32) / train_length, 1.0)
    scale = (factor * over - (factor - 1.0))[..., None]
    slowing = _ntk_slowing("dynamic_ntk_frequencies", width, scale)
    return rotary_frequencies(width, base).reshape((1,) * lengths.ndim + (-1,)) * slowing


def yarn_frequencies(
    width: int,
    base: float,
    *,
    factor: float,
    train_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Float[Array, "N"]:
    """YaRN: pairs that turn often while training are kept, those that seldom do interpolated.

    w_i (1 - r_i) + r_i w_i / factor, where r rises linearly from 0 at the pair that
    turns beta_fast times in train_length to 1 at the one that turns beta_slow times.
    Goes with `yarn_attention_factor`.

    Args:
      width, base: as in `rotary_frequencies`.
      factor: wanted length over trained length, at least 1.
      train_length: that the model was trained with.
      beta_fast, beta_slow: turns that bound the ramp; fast is more than slow.

    Raises:
      ValueError: factor is less than 1, or beta_fast is not more than beta_slow.

    Source: Peng et al. 2023, "YaRN", section 3.2 (arXiv:2309.00071). The ends of the
    ramp are rounded outwards to whole pairs, as in its code and in `transformers`.
    """
    _check_factor("yarn_frequencies", factor)
    if beta_fast <= beta_slow:
        raise ValueError(
            f"yarn_frequencies: beta_fast={beta_fast} must be more than beta_slow={beta_slow}"
        )

    def pair(turns):
        return width * math.log(train_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair(beta_fast)), 0)
    high = min(math.ceil(pair(beta_slow)), width - 1)
    ramp = (np.arange(width // 2) - low) / max(high - low, 1e-3)
    ramp = jnp.asarray(np.clip(ramp, 0.0, 1.0), jnp.float32)
    frequencies = rotary_frequencies(width, base)
    return frequencies * (1.0 - ramp) + frequencies / factor * ramp


def yarn_attention_factor(factor: float) -> float:
    """What YaRN multiplies queries and keys by, each: 0.1 ln(factor) + 1.

    Args:
      factor: wanted length over trained length, at least 1.

    Source: Peng et al. 2023, "YaRN", equation 22 (arXiv:2309.00071).
    """
    _check_factor("yarn_attention_factor", factor)
    return 0.1 * math.log(factor) + 1.0


def llama3_frequencies(
    width: int,
    base: float,
    *,
    factor: float,
    train_length: int,
    low_turns: float = 1.0,
    high_turns: float = 4.0,
) -> Float[Array, "N"]:
    """Llama 3.1: interpolated below `low_turns` in train_length, kept above `high_turns`.

    w_i (g_i + (1 - g_i) / factor),   g = clip((turns - low) / (high - low), 0, 1)

    Args:
      width, base: as in `rotary_frequencies`.
      factor: by which the slow pairs are slowed, at least 1.
      train_length: that the model was trained with.
      low_turns, high_turns: turns in train_length between which the rule changes;
        high is more than low.

    Raises:
      ValueError: factor is less than 1, or high_turns is not more than low_turns.

    Source: Llama Team 2024, "The Llama 3 Herd of Models" (arXiv:2407.21783), with
    the constants of its public code.
    """
    _check_factor("llama3_frequencies", factor)
    if high_turns <= low_turns:
        raise ValueError(
            f"llama3_frequencies: high_turns={high_turns} must be more than low_turns={low_turns}"
        )
    frequencies = rotary_frequencies(width, base)
    turns = frequencies * (train_length / (2 * math.pi))
    kept = jnp.clip((turns - low_turns) / (high_turns - low_turns), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


def log_n_scale(positions: Real[Array, "*B T"], train_length: int) -> Float[Array, "*B T"]:
    """Factor on queries that keeps attention as sharp as in training when keys are many.

    max(1, log(m + 1) / log(train_length)) for the query at position m

    A query at position m sees m + 1 keys, and the entropy of its attention stays
    the same if logits grow with the logarithm of that number. Up to train_length
    nothing changes.

    Args:
      positions: of the queries.
      train_length: that the model was trained with; at least 2.

    Raises:
      ValueError: train_length is less than 2.

    Source: Su 2021, "On the scale of attention from the invariance of entropy"
    (kexue.fm/archives/8823); Chiang and Cholak 2022, section 5 (arXiv:2202.12172).
    """
    if train_length < 2:
        raise ValueError(f"log_n_scale: train_length={train_length} must be at least 2")
    seen = jnp.maximum(positions.astype(jnp.float32) + 1.0, 1.0)
    return jnp.maximum(jnp.log(seen) / math.log(train_length), 1.0)


def _check_factor(function: str, factor: float) -> None:
    if factor < 1:
        raise ValueError(
            f"{function}: factor={factor} would shorten the context; pass wanted length over "
            f"trained length, at least 1"
        )


def _ntk_slowing(function: str, width: int, factor: float | Array) -> Array:
    """factor^(-2 i / (width - 2)): 1 for the fastest pair, 1 / factor for the slowest."""
    if width < 4:
        raise ValueError(
            f"{function}: width={width} has no slower pair than the fastest; it takes at least 4"
        )
    exponents = jnp.asarray(-np.arange(0, width, 2) / (width - 2), jnp.float32)
    if isinstance(factor, float):
        return factor**exponents
    return factor ** exponents.reshape((1,) * (factor.ndim - 1) + (-1,))
