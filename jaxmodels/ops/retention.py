"""Linear attention whose memory fades at a constant rate."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape, require_within
from jaxmodels.ops.gated_linear_attention import SCALAR_GATED_FORMS
from jaxmodels.ops.recurrence import run_recurrence


def retention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T H K"],
    v: Float[Array, "*B T H V"],
    decay: Float[Array, "H"],
    *,
    initial_state: Float[Array, "*B H K V"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K V"]]:
    """Linear attention whose memory fades by a fixed factor per head.

    out_t = sum over s <= t of decay^(t-s) (q_t . k_s) v_s

    Forms and costs are those of `scalar_gated_linear_attention`, which this is
    with the same gate at every step.

    Args:
      q, k: queries and keys, rotated and scaled by the caller.
      v: values.
      decay: per head, in (0, 1].
      initial_state, segment_ids, form, chunk_size: see
        `scalar_gated_linear_attention`.

    Returns:
      The outputs in v's dtype, and the memory of the last document in float32.

    Raises:
      ValueError: shapes disagree, a decay is outside (0, 1], the form is unknown
        or chunk_size < 1.

    Source: Sun et al. 2023, "Retentive Network", equations 5 to 7
    (arXiv:2307.08621).
    """
    require_within("retention", "decay", decay, 0.0, 1.0, open_low=True)
    require_shape("retention", "decay", decay, q.shape[-2:-1], "one a head, (H,)")
    log_decay = jnp.broadcast_to(jnp.log(decay.astype(jnp.float32)), q.shape[:-1])
    return run_recurrence(
        "retention",
        SCALAR_GATED_FORMS,
        q,
        k,
        v,
        {"log_decay": log_decay},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
    )


def retention_decays(num_heads: int) -> Float[Array, "H"]:
    """The decay of each head, from short memory to long: 1 - 2^(-5 - h), h = 0, 1, ...

    Source: Sun et al. 2023, "Retentive Network", equation 8 (arXiv:2307.08621).
    """
    return 1.0 - 2.0 ** -(5.0 + jnp.arange(num_heads, dtype=jnp.float32))
