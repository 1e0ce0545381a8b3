"""Biases on attention logits that depend on the distance from query to key alone.

Distances are positions of queries minus positions of keys: keys that were before
the query have positive ones.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodels.ops.query_blocks import attend_in_blocks, dot_products


def biased_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    bias: Callable[[Int[Array, "B R"], Int[Array, "B S"]], Float[Array, "B H R S"]],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block_size: int = 256,
    **options,
) -> Float[Array, "B T H V"]:
    """Attention with a bias by distance, which never is in memory as a whole.

    Equal to `ops.dot_product_attention(..., bias=bias(q_positions, k_positions))`,
    computed for block_size queries at a time; see `ops.query_blocks.attend_in_blocks`.

    Args:
      q, k, v: queries, keys and values; G divides H.
      q_positions, k_positions: what biases depend on. What is visible does not;
        that is up to the options.
      bias: from the positions of R queries and of all keys to biases.
      scale: factor on q . k; None is 1 / sqrt(K).
      softcap: bounds q . k before the bias is added.
      block_size: queries at once; need not divide T.
      **options: causal, window, mask, segment_ids and sinks, as in
        `ops.dot_product_attention`.

    Returns:
      The mixed values, in v's dtype.

    Source: none; the definition.
    """

    def logits(rows):
        q, places = rows
        return dot_products(q, k, scale=scale, softcap=softcap) + bias(places, k_positions)

    return attend_in_blocks(logits, (q, q_positions), v, block_size=block_size, **options)


def distances(
    q_positions: Int[Array, "*B T"], k_positions: Int[Array, "*B S"]
) -> Int[Array, "*B T S"]:
    """Positions of queries minus those of keys."""
    return q_positions[..., :, None] - k_positions[..., None, :]


def alibi_slopes(num_heads: int) -> Float[Array, "H"]:
    """Slopes 2^(-8 h / H), h = 1 ... H, where H is a power of two.

    Otherwise those of the next lower power of two, followed by every second one
    of the next higher.

    Args:
      num_heads: at least 1.

    Source: Press et al. 2021, "Train Short, Test Long", section 3
    (arXiv:2108.12409), and its code for other numbers of heads.
    """

    def slopes(n):
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    lower = 2 ** int(math.log2(num_heads))
    rest = slopes(2 * lower)[::2][: num_heads - lower]
    return jnp.asarray(np.concatenate([slopes(lower), rest]), jnp.float32)


def alibi_bias(
    distance: Int[Array, "*B T S"], slopes: Float[Array, "H"]
) -> Float[Array, "*B H T S"]:
    """ALiBi: -slope |distance|.

    Args:
      distance: positions of queries minus those of keys.
      slopes: one a head, see `alibi_slopes`.

    Source: Press et al. 2021, "Train Short, Test Long", section 3
    (arXiv:2108.12409).
    """
    return -_per_head(slopes, distance) * _magnitude(distance)


def kerple_log_bias(
    distance: Int[Array, "*B T S"], r1: Float[Array, "H"], r2: Float[Array, "H"]
) -> Float[Array, "*B H T S"]:
    """KERPLE, logarithmic: -r1 log(1 + r2 |distance|).

    Args:
      distance: positions of queries minus those of keys.
      r1, r2: one a head, positive.

    Source: Chi et al. 2022, "KERPLE", equation 3 (arXiv:2205.09921).
    """
    return -_per_head(r1, distance) * jnp.log1p(_per_head(r2, distance) * _magnitude(distance))


def kerple_power_bias(
    distance: Int[Array, "*B T S"], r1: Float[Array, "H"], r2: Float[Array, "H"]
) -> Float[Array, "*B H T S"]:
    """KERPLE, power: -r1 |distance|^r2, of which ALiBi is the case r2 = 1.

    Args:
      distance: positions of queries minus those of keys.
      r1, r2: one a head; r1 is positive, r2 in (0, 2].

    Source: Chi et al. 2022, "KERPLE", equation 3 (arXiv:2205.09921).
    """
    length = _magnitude(distance)
    # The logarithm of zero would make the gradient of r2 NaN; zero to any power is zero.
    logs = jnp.log(jnp.where(length > 0, length, 1.0))
    power = jnp.where(length > 0, jnp.exp(_per_head(r2, distance) * logs), 0.0)
    return -_per_head(r1, distance) * power


def sandwich_bias(
    q_positions: Int[Array, "*B T"],
    k_positions: Int[Array, "*B S"],
    num_heads: int,
    *,
    width: int = 128,
) -> Float[Array, "*B H T S"]:
    """Sandwich: the product of sinusoidal positions, compressed differently by each head.

    H / (8 h) (sum_i cos((m - n) / 10000^(2 i / width)) - width / 2),
    i = 1 ... width / 2,   h = 1 ... H

    It is 0 at distance 0 and falls roughly with the logarithm of the distance.

    Args:
      q_positions, k_positions: m and n.
      num_heads: H.
      width: of the sinusoidal positions, whatever that of the heads.

    Raises:
      ValueError: width is not a positive even number.

    Source: Chi et al. 2022, "Dissecting Transformer Length Extrapolation via the
    Lens of Receptive Field Analysis", section 6 (arXiv:2212.10356).
    """
    if width < 2 or width % 2:
        raise ValueError(f"sandwich_bias: width={width} must be a positive even number")
    waves = 10_000.0 ** (-2.0 * np.arange(1, width // 2 + 1) / width)
    waves = jnp.asarray(waves, jnp.float32).reshape((1,) * q_positions.ndim + (-1,))

    def features(positions):
        angles = positions.astype(jnp.float32)[..., None] * waves
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    product = jnp.einsum("...tw,...sw->...ts", features(q_positions), features(k_positions))
    heads = jnp.asarray(num_heads / (8.0 * np.arange(1, num_heads + 1)), jnp.float32)
    return _per_head(heads, product) * (product - width / 2)[..., None, :, :]


def t5_buckets(
    distance: Int[Array, "*B T S"],
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Int[Array, "*B T S"]:
    """The bucket of each distance: one each when near, logarithmically wider ones when far.

    With n buckets for a direction, distances d < n / 2 have bucket d, others
    n / 2 (1 + log(2 d / n) / log(2 max_distance / n)), rounded down, at most n - 1.

    Args:
      distance: positions of queries minus those of keys.
      bidirectional: gives half of the buckets to later keys; otherwise they all
        fall in bucket 0.
      num_buckets: in all.
      max_distance: from which on all share the last bucket.

    Raises:
      ValueError: there are too few buckets, or max_distance is not beyond the
        buckets of single distances.

    Source: Raffel et al. 2020, section 2.1 (arXiv:1910.10683), with the constants of
    its code.
    """
    number = num_buckets // 2 if bidirectional else num_buckets
    exact = number // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"t5_buckets: num_buckets={num_buckets} and max_distance={max_distance} leave no "
            f"bucket for near or none for far keys; take at least 4 buckets and a max_distance "
            f"beyond {max(exact, 1)}"
        )
    first = jnp.where(distance < 0, number, 0) if bidirectional else 0
    length = jnp.abs(distance) if bidirectional else jnp.maximum(distance, 0)
    # From the integer bounds of the buckets: a float32 logarithm errs at exact powers.
    steps = np.arange(1, number - exact) / (number - exact)
    bounds = np.ceil(exact * (max_distance / exact) ** steps - 1e-9).astype(np.int32)
    far = exact + jnp.searchsorted(jnp.asarray(bounds), length, side="right")
    return first + jnp.where(length < exact, length, far)


def _magnitude(distance: Array) -> Array:
    return jnp.abs(distance).astype(jnp.float32)[..., None, :, :]


def _per_head(x: Array, distance: Array) -> Array:
    """(H,) to (1, ..., H, 1, 1), of one dimension more than the distances."""
    return x.astype(jnp.float32).reshape((1,) * (distance.ndim - 2) + (-1, 1, 1))
