"""How often the right class is among the likeliest."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape, require_within


def top_k_accuracy(
    logits: Float[Array, "B K"], labels: Int[Array, "B"], k: int = 1
) -> Float[Array, ""]:
    """The share of examples whose class has one of the k largest logits.

    Of equal logits the class with the lower number comes first, as in
    `jnp.argmax` and `jax.lax.top_k`, so constant logits earn nothing; a label
    whose logit is NaN is wrong. Counts who is ahead of the label, O(B K).

    Args:
      logits: one row an example, in any unit that grows with likelihood.
      labels: from 0 to K - 1.
      k: 1 to K.

    Returns:
      A share in [0, 1], float32.

    Raises:
      ValueError: shapes disagree, k is out of range, or so are labels (only
        seen outside of compiled functions).
    """
    name = "top_k_accuracy"
    count, classes = logits.shape
    require_shape(name, "labels", labels, (count,), "(B,) of logits (B, K)")
    require_within(name, "k", k, 1, classes)
    require_within(name, "labels", labels, 0, classes - 1)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    later = jnp.arange(classes)[None] >= labels[:, None]
    # Asking who is behind makes a NaN be behind nobody.
    behind = (logits < own) | ((logits == own) & later)
    return jnp.mean(jnp.sum(~behind, axis=1) < k)
