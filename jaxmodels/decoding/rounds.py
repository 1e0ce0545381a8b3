"""The compiled loop of speculative decoding: guess, read, judge, keep, and again."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodels.decoding.choice import Choice
from jaxmodels.decoding.drafts import Draft, Guesses, Text
from jaxmodels.decoding.generate import NO_TOKEN
from jaxmodels.decoding.prompts import Prompts
from jaxmodels.decoding.states import is_cached, keep_first, keep_path_all, shorten_all, with_tree
from jaxmodels.ops.candidate_tree import CandidateTree
from jaxmodels.ops.speculative import (
    Accepted,
    accept_drawn,
    accept_drawn_tree,
    accept_equal,
    accept_typical,
)


class _Loop(NamedTuple):
    """What goes from round to round.

    Fields:
      text: what is certain.
      running: rows without a stop token yet.
      seen: tokens that each row has; None where nobody asks.
      state: the model's, of all the text but its last token.
      memory: the draft's.
      rounds: how many rounds have kept no guess, one, two, and so on.
    """

    text: Text
    running: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None
    state: Any
    memory: Any
    rounds: Int[Array, "P"]


class _Target(NamedTuple):
    """A `LanguageModel` and its parameters."""

    model: Any
    variables: Any

    def read(self, tokens, positions, state, segment_ids=None) -> tuple[Array, Any]:
        """Hidden (B, T, D) and the new state."""
        return self.model.apply(
            self.variables, tokens, positions, segment_ids, state, method="hidden"
        )

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Of the next token."""
        return self.model.apply(self.variables, hidden, method="logits")


class _Read(NamedTuple):
    """What the model says of a tree of candidates, and its state after reading them all."""

    tokens: Int[Array, "B N"]
    positions: Int[Array, "B N"]
    hidden: Float[Array, "B N D"]
    logits: Float[Array, "B N V"]
    state: Any


def generate_in_rounds(
    model: Any,
    max_new_tokens: int,
    variables: Mapping[str, Any],
    draft: Draft,
    prompts: Prompts,
    choice: Choice,
    typical: Float[Array, "2"] | None,
    key: Key[Array, ""] | None,
    stream: Callable[[np.ndarray], object] | None,
) -> tuple[Int[Array, "B N"], Int[Array, "B"], Int[Array, "P"]]:
    """What `speculative_generate` does once all is checked; returns the fields of `Speculation`."""
    length = prompts.tokens.shape[1]
    end = length + max_new_tokens
    loop = _begin(model, max_new_tokens, variables, draft, prompts, choice, key)
    write = partial(_write, model, variables, draft, choice, typical, key, end)
    # No more rounds than tokens: each has one of the model's own.
    if stream is None:
        loop = write(loop, max_new_tokens)
    else:
        loop = _write_aloud(write, choice, loop, end, stream)
    tokens, lengths = _without_rest(choice, loop.text.tokens[:, length:end])
    return tokens, lengths, loop.rounds


def _write_aloud(write, choice, loop: _Loop, end: int, stream: Callable) -> _Loop:
    """Calls the compiled loop for a round at a time, and hands on the tokens that it has won."""
    told, running = int(loop.text.length) - 1, np.ones(len(loop.running), bool)
    while True:
        won = np.asarray(loop.text.tokens)[:, told : min(int(loop.text.length), end)]
        for token in won.T:
            stream(np.where(running, token, NO_TOKEN))
            running = running & ~np.isin(token, choice.stop_tokens)
            told += 1
            if told == end or not running.any():
                return loop
        loop = write(loop, loop.rounds.sum() + 1)


@partial(jax.jit, static_argnums=(0, 1))
def _begin(model, max_new_tokens, variables, draft, prompts, choice, key) -> _Loop:
    """Reads the prompts, and draws the token after them."""
    target = _Target(model, variables)
    batch, length = prompts.tokens.shape
    room = length + max_new_tokens + len(draft.tree)
    hidden, state = target.read(
        prompts.tokens, None, model.init_state(batch, room), prompts.segment_ids
    )
    logits = target.logits(hidden[:, -1])
    real = None if prompts.segment_ids is None else prompts.segment_ids == 1
    seen = choice.first_seen(prompts.tokens, real, model.vocab_size)
    token = choice.token(logits, seen, _keys(key, 0)[0])
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, room - length)))
    loop = _Loop(
        text=Text(tokens, jnp.int32(length), length - prompts.lengths),
        running=jnp.ones(batch, bool),
        seen=seen,
        state=state,
        memory=None,
        rounds=jnp.zeros(draft.tree.depth + 1, jnp.int32),
    )
    loop = _take(loop, token[:, None], jnp.int32(1), choice)
    return loop._replace(memory=draft.start(loop.text, prompts.segment_ids, hidden, room))


@partial(jax.jit, static_argnums=(0, 6), donate_argnames="loop")
def _write(model, variables, draft, choice, typical, key, end, loop: _Loop, until) -> _Loop:
    """The compiled loop: goes on until so many rounds, the end, or every row has stopped."""
    target, tree = _Target(model, variables), draft.tree

    def go_on(loop):
        unfinished = (loop.text.length < end) & (jnp.sum(loop.rounds) < until)
        return unfinished & jnp.any(loop.running)

    def one_round(loop):
        guess_key, judge_key = _keys(key, jnp.sum(loop.rounds) + 1)
        # Guesses may follow any rule; the penalty would only make them slower.
        guess_choice = dataclasses.replace(choice, repetition_penalty=None)
        guesses, memory = draft.propose(loop.memory, loop.text, guess_choice, guess_key)
        read = _read(target, tree, loop, guesses)
        accepted = _judge(tree, typical, choice, guesses, read, loop.seen, judge_key)
        # Rows that have ended hold no other up.
        count = jnp.min(jnp.where(loop.running, accepted.count, tree.depth)) + 1
        state = _kept(target, tree, loop, read, accepted.path, count)
        hidden = jnp.take_along_axis(read.hidden, accepted.path[..., None], axis=1)
        loop = _take(loop, accepted.tokens, count, choice)
        return loop._replace(
            state=state,
            memory=draft.follow(memory, loop.text, hidden, count),
            rounds=loop.rounds.at[count - 1].add(1),
        )

    return lax.while_loop(go_on, one_round, loop)


@jax.jit
def _without_rest(choice, tokens) -> tuple[Array, Array]:
    """The tokens with NO_TOKEN after each row's first stop, and how many are real."""
    stops = choice.stops(tokens)
    most = tokens.shape[1]
    lengths = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, most)
    return jnp.where(jnp.arange(most)[None] < lengths[:, None], tokens, NO_TOKEN), lengths


def _keys(key, number) -> tuple[Any, Any]:
    return (None, None) if key is None else tuple(jax.random.split(jax.random.fold_in(key, number)))


def _read(target: _Target, tree: CandidateTree, loop: _Loop, guesses: Guesses) -> _Read:
    last = loop.text.length - 1
    tokens = jnp.concatenate([loop.text.part(last, 1), guesses.tokens], axis=1)
    positions = loop.text.positions(last + tree.depths, target.model.context)
    state = loop.state if tree.is_chain else with_tree(loop.state, jnp.asarray(tree.among))
    hidden, state = target.read(tokens, positions, state)
    return _Read(tokens, positions, hidden, target.logits(hidden), state)


def _judge(tree, typical, choice, guesses, read, seen, key) -> Accepted:
    """By the rule that the way of drawing and the kind of guesses ask for."""
    if seen is not None:
        seen = _seen_on_paths(tree, read.tokens, seen)
    if guesses.probabilities is None or typical is not None:
        own = choice.token(read.logits, seen, key)
    if guesses.probabilities is None and typical is None:
        return accept_equal(tree, guesses.tokens, own)
    probabilities = jax.nn.softmax(choice.filtered(read.logits, seen), axis=-1)
    if typical is not None:
        epsilon, delta = typical
        return accept_typical(
            tree, guesses.tokens, probabilities, own, epsilon=epsilon, delta=delta
        )
    if tree.is_chain:
        return accept_drawn(key, guesses.tokens, guesses.probabilities, probabilities)
    return accept_drawn_tree(key, tree, guesses.tokens, guesses.probabilities, probabilities)


def _seen_on_paths(tree, tokens, seen) -> Bool[Array, "B N V"]:
    """What the text has up to each node, with the guesses on the way."""
    guessed = jax.nn.one_hot(tokens, seen.shape[-1])
    on_path = jnp.einsum("nm,bmv->bnv", jnp.asarray(tree.among, guessed.dtype), guessed)
    return (on_path > 0) | seen[:, None]


def _kept(target, tree, loop, read, path, count) -> Any:
    """The state as if nothing but the kept guesses had been read."""
    if not is_cached(read.state):
        return keep_first(target.read, loop.state, read.tokens, read.positions, count)
    last = loop.text.length - 1
    if tree.is_chain:
        return shorten_all(read.state, last + count)
    return keep_path_all(read.state, last, path, count)


def _take(loop, tokens, count, choice) -> _Loop:
    """The loop with the first `count` of some tokens at its text's end."""
    text, new = loop.text, jnp.arange(tokens.shape[1])[None] < count
    running = loop.running & ~jnp.any(choice.stops(tokens) & new, axis=1)
    seen = loop.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens))[:, None], tokens].max(new)
    tokens = lax.dynamic_update_slice_in_dim(text.tokens, tokens, text.length, axis=1)
    text = Text(tokens, text.length + count, text.padding)
    return loop._replace(text=text, running=running, seen=seen)
