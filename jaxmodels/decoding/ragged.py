"""Prompts of many lengths without padding: end to end in one row, told apart by segment ids."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jaxmodels.decoding.prompts import check_prompt

# Rows shorter than the capacity are multiples of this: few programs, hardly any padding.
_STEP = 64


class RaggedPrompts(NamedTuple):
    """What a model is called with to read prompts laid end to end.

    Fields:
      tokens: (1, S), 0 behind the last prompt.
      segment_ids: (1, S), 1, 2 ... for the prompts, 0 behind the last.
      positions: (1, S), from 0 in each prompt.
      last: where each prompt's last token stands.
    """

    tokens: Int[np.ndarray, "1 S"]
    segment_ids: Int[np.ndarray, "1 S"]
    positions: Int[np.ndarray, "1 S"]
    last: Int[np.ndarray, "B"]


def join_ragged(
    prompts: Sequence[Integer[np.ndarray, "_"]], length: int | None = None
) -> RaggedPrompts:
    """Lays prompts end to end in a row.

    Args:
      prompts: a sequence of tokens each, none of them empty.
      length: S, of the row; None is the sum of the prompts' lengths. What remains is
        a document of its own.

    Returns:
      One row with all prompts, in order.
    """
    sizes = np.array([len(prompt) for prompt in prompts], np.int32)
    rest = sizes.sum() if length is None else length
    sizes = np.append(sizes, np.int32(rest - sizes.sum()))
    ends = np.cumsum(sizes)
    names = np.append(np.arange(1, len(sizes)), 0)
    row = np.zeros(rest, np.int32)
    row[: ends[-2]] = np.concatenate(prompts)
    segment_ids = np.repeat(names, sizes).astype(np.int32)
    positions = np.arange(rest, dtype=np.int32) - np.repeat(ends - sizes, sizes)
    return RaggedPrompts(row[None], segment_ids[None], positions[None], ends[:-1] - 1)


def last_logits(
    model: Any,
    variables: Mapping[str, Any],
    prompts: Sequence[Any],
    *,
    capacity: int = 2048,
) -> Float[Array, "B V"]:
    """The logits of the token that follows each prompt.

    Prompts are packed into rows of `capacity` tokens (`first_fit_decreasing`), and the
    model reads a row at a time: almost no work is spent on padding, and attention
    costs O(capacity) a token. One program serves all rows. Another one is compiled
    where all prompts together are shorter than a row, for each multiple of 64, and for
    each power of two that the number of prompts in a row exceeds.

    Args:
      model: a `LanguageModel`.
      variables: its parameters as {"params": ...}, with other collections it has.
      prompts: a sequence of tokens each, as many and as unequal as you like.
      capacity: tokens in a row, at least those of the longest prompt.

    Returns:
      Logits in float32, in the order of the prompts.

    Raises:
      ValueError: there is no prompt; or one is empty, longer than the capacity or the
        model's context, or not of its vocabulary.
    """
    # Here, because the data sets take a second to import that generation has no use for.
    from jaxmodels.data.packing import first_fit_decreasing

    rows = _checked(prompts, capacity, model)
    sizes = np.array([len(row) for row in rows])
    length = min(capacity, -(-int(sizes.sum()) // _STEP) * _STEP)
    bins = first_fit_decreasing(sizes, length)
    most = 1 << int(np.bincount(bins).max() - 1).bit_length()
    order = np.argsort(bins, kind="stable")
    found = []
    for group in np.split(order, np.cumsum(np.bincount(bins))[:-1]):
        joined = join_ragged([rows[i] for i in group], length)
        last = np.pad(joined.last, (0, most - len(group)))
        found.append(_read(model, variables, joined._replace(last=last))[: len(group)])
    return jnp.concatenate(found)[np.argsort(order)]


@partial(jax.jit, static_argnums=0)
def _read(model, variables, joined: RaggedPrompts):
    tokens, segment_ids, positions, last = joined
    hidden, _ = model.apply(variables, tokens, positions, segment_ids, method="hidden")
    return model.apply(variables, hidden[0, last], method="logits")


def _checked(prompts: Sequence[Any], capacity: int, model: Any) -> list[np.ndarray]:
    if not len(prompts):
        raise ValueError("last_logits: prompts is empty; pass one sequence of tokens or more")
    rows = [np.asarray(prompt) for prompt in prompts]
    most = capacity if model.context is None else min(capacity, model.context)
    for i, row in enumerate(rows):
        check_prompt(f"last_logits: prompts[{i}]", row, model.vocab_size)
        if len(row) > most:
            raise ValueError(
                f"last_logits: prompts[{i}] has {len(row)} tokens, more than capacity={capacity} "
                f"or the model's context={model.context}; raise capacity or shorten it"
            )
    return rows
