"""Text from a language model, a token at a time, in one compiled loop."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from jaxmodels.decoding.choice import Choice, make_choice
from jaxmodels.decoding.prompts import Prompts, join_prompts

# Stands where a sequence has ended before others of its batch.
NO_TOKEN = -1


class Generation(NamedTuple):
    """What was generated.

    Fields:
      tokens: (B, N) without the prompt; NO_TOKEN = -1 after a stop token.
      lengths: how many tokens of each row are real, the stop token included.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]

    def sequences(self) -> list[list[int]]:
        """The new tokens of each row, without padding."""
        rows = zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)
        return [row[:length].tolist() for row, length in rows]


def generate(
    model: Any,
    variables: Mapping[str, Any],
    prompts: Sequence[Any] | np.ndarray | Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_tokens: Sequence[int] = (),
    key: Key[Array, ""] | None = None,
    stream: Callable[[np.ndarray], object] | None = None,
) -> Generation:
    """Continues prompts, a token after the other.

    token_t ~ softmax(filters(logits_t / temperature)),   logits_t = model(tokens before t)

    The prompts are read in one call of the model; then a compiled loop calls it with
    each token and the state before, until every row has stopped. With `stream` the
    same loop is called for a token at a time. Programs are compiled anew only for
    another number or longest length of prompts, max_new_tokens, top_k, number of
    stop tokens, or set of options.

    Args:
      model: a `LanguageModel`.
      variables: its parameters as {"params": ...}, with other collections it has.
      prompts: a sequence of tokens each; lengths may differ.
      max_new_tokens: after each prompt; fewer where a stop token comes.
      temperature: 0 takes the likeliest token.
      top_k, top_p, min_p, repetition_penalty: see `ops.logit_filters`; None for none.
      stop_tokens: a row ends after any of them.
      key: of the draws, where temperature is above 0.
      stream: called after each step with its (B,) tokens, -1 for rows that have ended.

    Returns:
      The new tokens.

    Raises:
      ValueError: a prompt is empty, too long for the context or not of the
        vocabulary; a stop token outside of it; a number outside its range; no
        key to draw with, or filters where nothing is drawn.

    Source: the definition; penalty, temperature, top-k, top-p and min-p follow each
    other as in `transformers`.
    """
    joined = join_prompts(
        prompts,
        vocab_size=model.vocab_size,
        context=model.context,
        max_new_tokens=max_new_tokens,
        name="generate",
    )
    choice = make_choice(
        "generate",
        model.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_tokens=stop_tokens,
        key=key,
    )
    loop = _read(model, max_new_tokens, variables, joined, choice, key)
    write = partial(_write, model, variables, choice, key)
    loop = write(loop, max_new_tokens) if stream is None else _write_aloud(write, loop, stream)
    return Generation(loop.tokens, loop.lengths)


def _write_aloud(write: Callable, loop, stream: Callable[[np.ndarray], object]):
    """Calls the compiled loop for a token at a time, and hands it on."""
    number = loop.tokens.shape[1]
    for step in range(number):
        stream(np.asarray(loop.tokens)[:, step])
        if step + 1 == number or not np.any(loop.running):
            break
        loop = write(loop, step + 2)
    return loop


class _Loop(NamedTuple):
    """What goes from step to step.

    Fields:
      step: how many tokens there are.
      token, position: the last one of each row, which the model has yet to read, and its place.
      tokens, lengths: as of `Generation`.
      running: rows without a stop token yet.
      seen: tokens that each row has; None where nobody asks.
      state: the model's.
    """

    step: Int[Array, ""]
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    running: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None
    state: Any


@partial(jax.jit, static_argnums=(0, 1))
def _read(model, max_new_tokens, variables, prompts: Prompts, choice: Choice, key) -> _Loop:
    """Reads the prompts and chooses the first token."""
    batch, length = prompts.tokens.shape
    hidden, state = model.apply(
        variables,
        prompts.tokens,
        segment_ids=prompts.segment_ids,
        state=model.init_state(batch, length + max_new_tokens),
        method="hidden",
    )
    real = None if prompts.segment_ids is None else prompts.segment_ids == 1
    nothing = _Loop(
        step=jnp.int32(0),
        token=jnp.zeros(batch, jnp.int32),
        position=prompts.lengths - 1,
        tokens=jnp.full((batch, max_new_tokens), NO_TOKEN, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        running=jnp.ones(batch, bool),
        seen=choice.first_seen(prompts.tokens, real, model.vocab_size),
        state=state,
    )
    return _choose(model, variables, choice, key, nothing, hidden)


@partial(jax.jit, static_argnums=0, donate_argnames="loop")
def _write(model, variables, choice: Choice, key, loop: _Loop, until) -> _Loop:
    """The compiled loop: goes on until there are so many tokens or every row has stopped."""

    def go_on(loop):
        return (loop.step < until) & jnp.any(loop.running)

    def one_step(loop):
        hidden, state = model.apply(
            variables,
            loop.token[:, None],
            positions=loop.position[:, None],
            state=loop.state,
            method="hidden",
        )
        return _choose(model, variables, choice, key, loop._replace(state=state), hidden)

    return lax.while_loop(go_on, one_step, loop)


def _choose(model, variables, choice, key, loop: _Loop, hidden) -> _Loop:
    """Chooses the token that follows the last of `hidden`, and writes it down."""
    logits = model.apply(variables, hidden[:, -1], method="logits")
    key = None if key is None else jax.random.fold_in(key, loop.step)
    token = choice.token(logits, loop.seen, key)
    shown = jnp.where(loop.running, token, NO_TOKEN)[:, None]
    seen = loop.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return loop._replace(
        step=loop.step + 1,
        token=token,
        position=loop.position + 1,
        tokens=lax.dynamic_update_slice_in_dim(loop.tokens, shown, loop.step, axis=1),
        lengths=loop.lengths + loop.running,
        running=loop.running & ~choice.stops(token),
        seen=seen,
    )
