"""Optimizers as recipes use them; the algorithms are optax's.

All share one story: clip the gradient's norm, find a direction, add the decay of
the weights, multiply by a learning rate that rises and falls. They differ in
the direction, and in whether the decay comes before it (L2) or after (decoupled).
"""

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxmodels.training.sharding import path_name

# Muon is for matrices between hidden layers; first and last layers take Adam.
_HIDDEN_MATRICES = r"^(?!.*(head|embed)).*kernel$"


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


def make_optimizer(
    name: str,
    learning_rate: float,
    *,
    steps: int,
    warmup: int = 0,
    final_fraction: float = 0.0,
    b1: float | None = None,
    b2: float | None = None,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    decay_pattern: str = r"kernel$",
) -> optax.GradientTransformation:
    """An optimizer by name, with warm-up, cosine decay, clipping and a decay mask.

    decoupled:   w' = w - lr (direction(g) + weight_decay w)
    L2:          w' = w - lr direction(g + weight_decay w)

    | name      | direction                          | decay     | b1   | b2    |
    |-----------|------------------------------------|-----------|------|-------|
    | adamw     | Adam                               | decoupled | 0.9  | 0.999 |
    | adam_l2   | Adam                               | L2        | 0.9  | 0.999 |
    | sgd       | momentum                           | L2        | 0.9  |       |
    | lion      | sign of a momentum                 | decoupled | 0.9  | 0.99  |
    | muon      | orthogonalised momentum            | decoupled | 0.95 | 0.999 |
    | adafactor | gradient over a factored second    | decoupled |      |       |
    |           | moment, times the parameter's RMS  |           |      |       |

    Lion wants about a third to a tenth of Adam's learning rate. Muon's updates
    are scaled to the size of Adam's, so that its rate and decay serve; it takes
    the kernels of hidden layers (a convolution's as one matrix, stacked ones
    each alone), the rest NAdam. Adafactor's rate is relative to each
    parameter's size, about 1e-2.

    Args:
      name: from the table.
      learning_rate: the peak, reached after `warmup` steps.
      steps: length of the whole schedule, warm-up included.
      warmup: steps of the linear rise from zero; less than `steps`.
      final_fraction: learning rate at the end as a fraction of the peak, in [0, 1].
      b1, b2: decay of the first and second moment, in [0, 1); None for the table's.
        Muon's b2 is its Adam's.
      weight_decay: multiplied by the current learning rate.
      clip_norm: largest global gradient norm, or None.
      decay_pattern: which parameters decay, see `decay_mask`.

    Raises:
      ValueError: an unknown name, a moment the optimizer does not have, `warmup`
        not below `steps`, or a value out of its range.

    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2; Kingma & Ba 2015
    (arXiv:1412.6980); Chen et al. 2023 (arXiv:2302.06675), algorithm 2; Jordan et al. 2024,
    "Muon", with the scale of Liu et al. 2025 (arXiv:2502.16982), equation 4; Shazeer &
    Stern 2018 (arXiv:1804.04235), algorithm 5.
    """
    if name not in _RULES:
        near = difflib.get_close_matches(name, _RULES, n=2) or list(_RULES)
        raise ValueError(
            f"make_optimizer: unknown optimizer {name!r}; did you mean {' or '.join(near)}? "
            f"There are {', '.join(_RULES)}"
        )
    where, rule = f"make_optimizer: {name}", _RULES[name]
    schedule = _schedule(where, learning_rate, steps, warmup, final_fraction)
    if weight_decay < 0:
        raise ValueError(f"{where}: weight_decay={weight_decay} must not be negative")
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"{where}: clip_norm={clip_norm} must be positive; None means no clipping")
    direction = rule.direction(**_moments(where, rule, b1=b1, b2=b2))
    decay = optax.add_decayed_weights(
        weight_decay, mask=lambda params: decay_mask(params, decay_pattern)
    )
    parts = (direction, decay) if rule.decoupled else (decay, direction)
    update = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    return (
        update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
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

    Args: as of `make_optimizer`, whose `"adamw"` it is.

    Raises:
      ValueError: as `make_optimizer`.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"
    (arXiv:1711.05101), algorithm 2.
    """
    return make_optimizer(
        "adamw",
        learning_rate,
        steps=steps,
        warmup=warmup,
        final_fraction=final_fraction,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        decay_pattern=decay_pattern,
    )


def _schedule(
    where: str, learning_rate: float, steps: int, warmup: int, final_fraction: float
) -> optax.Schedule:
    if not 0 <= warmup < steps:
        raise ValueError(f"{where}: warmup={warmup} must be at least 0 and below steps={steps}")
    if learning_rate <= 0:
        raise ValueError(f"{where}: learning_rate={learning_rate} must be positive")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"{where}: final_fraction={final_fraction} must lie in [0, 1]")
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=learning_rate * final_fraction,
    )


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How an optimizer finds its direction, its moments, and where the decay goes."""

    direction: Callable[..., optax.GradientTransformation]
    moments: dict[str, float]
    decoupled: bool = True


def _moments(where: str, rule: _Rule, **given: float | None) -> dict[str, float]:
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in rule.moments:
            has = ", ".join(rule.moments) or "neither moment"
            raise ValueError(f"{where}: {name}={value} is of no use to it; it has {has}")
        if not 0 <= value < 1:
            raise ValueError(f"{where}: {name}={value} must lie in [0, 1)")
    return rule.moments | given


def _momentum(b1: float) -> optax.GradientTransformation:
    return optax.trace(b1)


def _muon(b1: float, b2: float) -> optax.GradientTransformation:
    return optax.contrib.muon(
        # Its own minus sign taken back: the learning rate comes later.
        -1.0,
        beta=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=_matrices,
        # The root mean square of Adam's updates, by which rates carry over.
        consistent_rms=0.2,
    )


def _matrices(params: Any) -> Any:
    """Which axes of a hidden layer's kernel go in and out; None for other parameters."""

    def axes(path, leaf):
        if leaf.ndim < 2 or re.search(_HIDDEN_MATRICES, path_name(path)) is None:
            return None
        # Three axes are stacked matrices, four a picture's convolution.
        first = 1 if leaf.ndim % 2 else 0
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map_with_path(axes, params)


def _adafactor() -> optax.GradientTransformation:
    return optax.chain(optax.adafactor(), optax.scale(-1.0))


_RULES = {
    "adamw": _Rule(optax.scale_by_adam, {"b1": 0.9, "b2": 0.999}),
    "adam_l2": _Rule(optax.scale_by_adam, {"b1": 0.9, "b2": 0.999}, decoupled=False),
    "sgd": _Rule(_momentum, {"b1": 0.9}, decoupled=False),
    "lion": _Rule(optax.scale_by_lion, {"b1": 0.9, "b2": 0.99}),
    "muon": _Rule(_muon, {"b1": 0.95, "b2": 0.999}),
    "adafactor": _Rule(_adafactor, {}),
}
