"""Optimizers as recipes use them; the algorithms are optax's."""

import re
from typing import Any

import jax
import optax

from jaxmodels.training.sharding import path_name


def decay_mask(params: Any, pattern: str = r"kernel$") -> Any:
    """Marks the parameters that weight decay applies to.

    Args:
      params: a parameter tree.
      pattern: regular expression searched in paths such as `blocks/mlp/up/kernel`.
        The default decays weight matrices and leaves biases, norms, gates and
        embeddings alone, also where layers are stacked and a bias has two axes.

    Returns:
      A tree of booleans shaped like `params`.
    """
    return jax.tree.map_with_path(
        lambda path, _: re.search(pattern, path_name(path)) is not None, params
    )


def adamw(
    learning_rate: float,
    *,
    steps: int,
    warmup: int = 0,
    final_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    decay_pattern: str = r"kernel$",
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay, gradient clipping and a decay mask.

    Args:
      learning_rate: the peak, reached after `warmup` steps.
      steps: length of the whole schedule, warm-up included.
      warmup: steps of the linear rise from zero; less than `steps`.
      final_fraction: learning rate at the end as a fraction of the peak, in [0, 1].
      b1, b2: decay of the first and second moment, in [0, 1).
      weight_decay: decoupled; multiplied by the current learning rate.
      clip_norm: largest global gradient norm, or None.
      decay_pattern: which parameters decay, see `decay_mask`.

    Raises:
      ValueError: `warmup` is not below `steps`, or a value is out of its range.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"
    (arXiv:1711.05101), algorithm 2.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"adamw: warmup={warmup} must be at least 0 and below steps={steps}")
    if learning_rate <= 0 or weight_decay < 0:
        raise ValueError(
            f"adamw: learning_rate={learning_rate} must be positive and "
            f"weight_decay={weight_decay} not negative"
        )
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"adamw: clip_norm={clip_norm} must be positive; None means no clipping")
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=learning_rate * final_fraction,
    )
    update = optax.adamw(
        schedule,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        mask=lambda params: decay_mask(params, decay_pattern),
    )
    return (
        update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
    )
