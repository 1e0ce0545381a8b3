"""Rotary positions that no distance beyond training can reach: ReRoPE and Leaky ReRoPE."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.query_blocks import attend_in_blocks, dot_products
from jaxmodels.ops.rotary import rotary_angles, rotate


def rerope_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    frequencies: Float[Array, "*#C N"],
    *,
    rectify_at: int,
    leak: float | None = None,
    layout: str = "half",
    magnitude: float = 1.0,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    mask: Bool[Array, "..."] | None = None,
    block_size: int = 256,
    **options,
) -> Float[Array, "B T H V"]:
    """Causal attention whose rotary distances are rectified beyond a window.

    l_ts = scale q_t R(f(t - s)) k_s,   R turns pairs of channels
    f(d) = d for d < w, else w + (d - w) / leak, or w without a leak;   w = rectify_at

    Exact, by two products: one of q and k turned as usual, and one of q turned by
    w + (t - w) / leak and k by s / leak (by w and not at all without a leak), of
    which each pair takes the one for its distance. For block_size queries at a
    time: memory is O(S block_size), time twice that of dense attention.

    Args:
      q, k, v: queries, keys and values, before any rotation; G divides H.
      q_positions, k_positions: of the tokens.
      frequencies: those the model was trained with; see `ops.rotary`.
      rectify_at: distance from which on positions are rectified, at least 1 and
        less than the trained length; w of the paper, its "window".
      leak: how many times slower positions grow from there, at least 1;
        None is ReRoPE, where they do not grow.
      layout, magnitude: as in `ops.rotary.rotate`.
      scale, softcap: on the products, as in `ops.dot_product_attention`.
      causal, mask: one of them must hide all keys after the query.
      block_size: queries at once; need not divide T.
      **options: window, segment_ids and sinks, as in `ops.dot_product_attention`.

    Returns:
      The mixed values, in v's dtype.

    Raises:
      ValueError: rectify_at or leak is less than 1, or neither causal nor mask is given.

    Source: Su 2023, "Rectified Rotary Position Embeddings", equations 1 and 2 of its
    README (github.com/bojone/rerope; kexue.fm/archives/9708).
    """
    _check(rectify_at, leak, causal, mask)

    def turn(x, places):
        angles = rotary_angles(places, frequencies)
        return rotate(x, angles, layout=layout, magnitude=magnitude)

    slope = 0.0 if leak is None else 1.0 / leak
    near_k, far_k = turn(k, k_positions), turn(k, slope * k_positions)
    far_places = rectify_at + slope * (q_positions - rectify_at)

    def logits(rows):
        near_q, far_q, places = rows
        near = dot_products(near_q, near_k, scale=scale, softcap=softcap)
        far = dot_products(far_q, far_k, scale=scale, softcap=softcap)
        distance = places[:, :, None] - k_positions[:, None, :]
        return jnp.where((distance < rectify_at)[:, None], near, far)

    rows = (turn(q, q_positions), turn(q, far_places), q_positions)
    return attend_in_blocks(
        logits, rows, v, causal=causal, mask=mask, block_size=block_size, **options
    )


def naive_rerope_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    frequencies: Float[Array, "N"],
    *,
    rectify_at: int,
    leak: float | None = None,
    layout: str = "half",
) -> Float[Array, "B T H V"]:
    """The definition of `rerope_attention`: every pair has its own rotation, O(T S K).

    Causal, with queries aligned with the last keys, positions counted from zero
    and the scale 1 / sqrt(K).

    Source: Su 2023, as `rerope_attention`.
    """
    num_queries, num_keys, width = q.shape[1], k.shape[1], q.shape[-1]
    queries, keys = jnp.arange(num_keys - num_queries, num_keys), jnp.arange(num_keys)
    distance = queries[:, None] - keys[None, :]
    slope = 0.0 if leak is None else 1.0 / leak
    places = jnp.where(
        distance < rectify_at, distance, rectify_at + slope * (distance - rectify_at)
    )
    pairs = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], num_keys, *q.shape[2:]))
    turned = rotate(pairs, rotary_angles(places, frequencies)[None], layout=layout)
    logits = jnp.einsum("btshk,bshk->bhts", turned, k) / math.sqrt(width)
    weights = jax.nn.softmax(jnp.where(distance >= 0, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, v)


def _check(rectify_at: int, leak: float | None, causal: bool, mask: Array | None) -> None:
    if rectify_at < 1:
        raise ValueError(f"rerope_attention: rectify_at={rectify_at} must be at least 1")
    if leak is not None and leak < 1:
        raise ValueError(
            f"rerope_attention: leak={leak} would make positions grow faster beyond the window; "
            f"pass at least 1, or None for ReRoPE"
        )
    if not causal and mask is None:
        raise ValueError(
            "rerope_attention: distances are rectified to the left only; pass causal=True, or a "
            "mask that hides the keys after each query"
        )
