"""What is done to the logits of the next token before one is drawn from them.

All functions take logits and return logits of the same shape and dtype; a token
that is ruled out has -inf. Numbers may be traced arrays, so that another
temperature needs no other program; only `k` is part of the program. Equal logits
are kept or ruled out together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodels.ops.checks import require_within

# A number, or a traced scalar.
Number = float | int | Float[Array, ""]


def apply_filters(
    logits: Float[Array, "*B V"],
    *,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
) -> Float[Array, "*B V"]:
    """Divides by the temperature, then applies top-k, top-p and min-p to what is left.

    Args:
      logits: of the next token.
      temperature: above 0; greedy choice, its limit 0, is an argmax of the caller's.
      top_k, top_p, min_p: as in `keep_top_k`, `keep_top_p`, `keep_min_p`; None for none.

    Returns:
      Logits whose softmax is the distribution to draw from.

    Raises:
      ValueError: a number outside its range.
    """
    logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return logits


def scale_by_temperature(logits: Float[Array, "*B V"], temperature: Number) -> Float[Array, "*B V"]:
    """Sharpens a distribution below temperature 1 and flattens it above.

    out_v = logits_v / temperature

    Args:
      logits: of the next token.
      temperature: above 0.

    Returns:
      The logits over the temperature.

    Raises:
      ValueError: temperature is not positive.

    Source: Ackley, Hinton & Sejnowski 1985, "A Learning Algorithm for Boltzmann
    Machines", equation 1.
    """
    require_within(
        "scale_by_temperature", "temperature", temperature, 0, float("inf"), open_low=True
    )
    return (logits / temperature).astype(logits.dtype)


def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """Rules out all but the k likeliest tokens.

    out_v = logits_v if logits_v >= the k-th largest logit, else -inf

    Args:
      logits: of the next token.
      k: at least 1; more than there are tokens is all of them.

    Returns:
      The logits; more than k are left where several equal the k-th.

    Raises:
      ValueError: k is below 1.

    Source: Fan, Lewis & Dauphin 2018, "Hierarchical Neural Story Generation",
    section 5.1 (arXiv:1805.04833).
    """
    if k < 1:
        raise ValueError(f"keep_top_k: k={k} leaves no token to draw; pass 1 or more, or None")
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return _keep(logits, logits >= largest[..., -1:])


def keep_top_p(logits: Float[Array, "*B V"], p: Number) -> Float[Array, "*B V"]:
    """Rules out all but the nucleus, the likeliest tokens that together have probability p.

    out_v = logits_v if the tokens less likely than v, and v, have more than 1 - p, else -inf

    Args:
      logits: of the next token.
      p: in (0, 1]; 1 keeps all.

    Returns:
      The logits; the likeliest token is always left.

    Raises:
      ValueError: p is outside (0, 1].

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration",
    section 3.1 (arXiv:1904.09751).
    """
    require_within("keep_top_p", "p", p, 0, 1, open_low=True)
    # From the least likely up, since small probabilities vanish in a sum near 1.
    ascending = jnp.sort(logits, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending.astype(jnp.float32), axis=-1), axis=-1)
    smallest = jnp.min(jnp.where(mass > 1 - p, ascending, jnp.inf), axis=-1, keepdims=True)
    return _keep(logits, logits >= jnp.minimum(smallest, ascending[..., -1:]))


def keep_min_p(logits: Float[Array, "*B V"], p: Number) -> Float[Array, "*B V"]:
    """Rules out tokens that are less than p times as likely as the likeliest.

    out_v = logits_v if logits_v >= max(logits) + log(p), else -inf

    Args:
      logits: of the next token.
      p: in [0, 1]; 0 keeps all, 1 the likeliest alone.

    Returns:
      The logits; the likeliest token is always left.

    Raises:
      ValueError: p is outside [0, 1].

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative
    and Coherent LLM Outputs", section 3 (arXiv:2407.01082).
    """
    require_within("keep_min_p", "p", p, 0, 1)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return _keep(logits, logits >= largest + jnp.log(p))


def penalize_repetition(
    logits: Float[Array, "*B V"], seen: Bool[Array, "..."], penalty: Number
) -> Float[Array, "*B V"]:
    """Makes tokens that the text has already less likely.

    out_v = logits_v / penalty if logits_v > 0 else logits_v * penalty,   v seen

    Args:
      logits: of the next token.
      seen: (*B, V), True for tokens of the prompt and of what was generated.
      penalty: above 0; 1 changes nothing, more discourages.

    Returns:
      The logits, those of unseen tokens unchanged.

    Raises:
      ValueError: penalty is not positive, or shapes disagree.

    Source: Keskar et al. 2019, "CTRL", section 4.1 (arXiv:1909.05858); that
    negative logits are multiplied is how its published code has it since.
    """
    require_within("penalize_repetition", "penalty", penalty, 0, float("inf"), open_low=True)
    if seen.shape != logits.shape:
        raise ValueError(
            f"penalize_repetition: seen {seen.shape} must have the shape of logits "
            f"{logits.shape}, True for a token that was seen"
        )
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized.astype(logits.dtype), logits)


def _keep(logits: Array, kept: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)
