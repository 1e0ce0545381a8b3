"""Prompts of unequal length as one array: padded on the left, so that all end together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Prompts(NamedTuple):
    """What a model is called with to read the prompts.

    Fields:
      tokens: (B, T), 0 on padding.
      segment_ids: (B, T), 0 on padding and 1 on tokens, so that padding is a
        document that no token sees; None without any padding.
      lengths: of the prompts, which is the position of the token that follows each.
    """

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    lengths: Int[Array, "B"]


def join_prompts(
    prompts: Sequence[Any] | np.ndarray | jax.Array,
    *,
    vocab_size: int,
    context: int | None,
    max_new_tokens: int,
    name: str,
) -> Prompts:
    """Pads prompts on the left to the longest of them.

    Args:
      prompts: a sequence of tokens each.
      vocab_size: tokens are 0 to vocab_size - 1.
      context: tokens that the model takes, or None.
      max_new_tokens: that are to follow.
      name: of the function that was called, for the error.

    Returns:
      One batch of the prompts.

    Raises:
      ValueError: there is no prompt, one is empty, is not a sequence of tokens of
        the vocabulary, or has no room in the context for the new tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"{name}: max_new_tokens={max_new_tokens} must be 1 or more")
    if not len(prompts):
        raise ValueError(f"{name}: prompts is empty; pass one sequence of tokens or more")
    rows = [np.asarray(prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        check_prompt(f"{name}: prompts[{i}]", row, vocab_size)
        if context is not None and len(row) + max_new_tokens > context:
            raise ValueError(
                f"{name}: prompts[{i}] of {len(row)} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the model's context={context}; shorten the prompt, or ask for "
                f"{max(context - len(row), 0)} new tokens"
            )
    lengths = np.array([len(row) for row in rows], np.int32)
    real = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
    tokens = np.zeros(real.shape, np.int32)
    tokens[real] = np.concatenate(rows)
    segment_ids = None if real.all() else jnp.asarray(real, jnp.int32)
    return Prompts(jnp.asarray(tokens), segment_ids, jnp.asarray(lengths))


def check_prompt(name: str, row: np.ndarray, vocab_size: int) -> None:
    """Raises unless `row` is a sequence of tokens of the vocabulary.

    Args:
      name: of the function and the prompt, for the error.
      row: the prompt.
      vocab_size: tokens are 0 to vocab_size - 1.

    Raises:
      ValueError: naming what is wrong with it, and the remedy.
    """
    if row.ndim != 1:
        raise ValueError(
            f"{name} has shape {row.shape}; each prompt is one sequence of tokens, so pass a "
            f"single one as [prompt]"
        )
    if not row.size:
        raise ValueError(f"{name} is empty, and nothing follows nothing; begin with one token")
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"{name} is of {row.dtype}, not integers; encode text to tokens first")
    if row.min() < 0 or row.max() >= vocab_size:
        wrong = row[(row < 0) | (row >= vocab_size)][0]
        raise ValueError(
            f"{name} holds the token {wrong}, outside [0, vocab_size={vocab_size}); it was "
            f"encoded by another tokenizer"
        )
