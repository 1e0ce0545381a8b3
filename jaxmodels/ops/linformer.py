"""Attention to a fixed number of projections of the sequence."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_within
from jaxmodels.ops.linear_attention import linear_attention


def linformer_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    key_projection: Float[Array, "L R"],
    value_projection: Float[Array, "L R"],
    *,
    positions: Int[Array, "*B T"],
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> Float[Array, "*B T H V"]:
    """Softmax attention to R mixtures of the keys and values instead of to all T.

    out_t = sum_r softmax_r(q_t . (E k)_r / sqrt(K)) (F v)_r
    (E k)_r = sum_s E_(p_s, r) k_s,   (F v)_r = sum_s F_(p_s, r) v_s,   s in t's document

    The logits q_t . sum_s k_s E_(p_s) are bidirectional linear attention whose
    values are rows of E, and the output is again, with rows of F as keys: two calls
    of `ops.linear_attention`, which knows documents. Time O(T R (K + V)), memory
    O(T R). Every document is projected from its first position, as if alone.

    Args:
      q, k, v: queries, keys and values, not scaled.
      key_projection: E, a row of R weights for each of L positions, for all heads.
      value_projection: F, likewise.
      positions: p, which row a token takes; from 0 to L - 1.
      segment_ids: of the documents, which do not see each other.
      form, chunk_size: as in `ops.linear_attention`.

    Returns:
      The mixed values, in v's dtype.

    Raises:
      ValueError: shapes disagree, the form is unknown, or (where values are known,
        outside of jit) a position is beyond the projections.

    Source: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity",
    equation 7 and the sharing of E and F by heads of section 4 (arXiv:2006.04768).
    """
    name = "linformer_attention"
    if key_projection.shape != value_projection.shape:
        raise ValueError(
            f"{name}: key_projection {key_projection.shape} and value_projection "
            f"{value_projection.shape} must both be (L, R), a row for each position"
        )
    if q.shape[:-2] != positions.shape:
        raise ValueError(f"{name}: positions {positions.shape} must be (*B, T) of q {q.shape}")
    require_within(name, "positions", positions, 0, key_projection.shape[0] - 1)
    options = {"causal": False, "normalise": False, "segment_ids": segment_ids}
    options |= {"form": form, "chunk_size": chunk_size}

    def rows(projection):
        # Out of range is nan, not the nearest row, where it cannot be an error.
        taken = projection.astype(jnp.float32).at[positions].get(mode="fill", fill_value=jnp.nan)
        return jnp.broadcast_to(taken[..., None, :], (*q.shape[:-1], projection.shape[1]))

    logits, _ = linear_attention(q, k, rows(key_projection), **options)
    chosen = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1)
    out, _ = linear_attention(chosen, rows(value_projection), v, **options)
    return out
