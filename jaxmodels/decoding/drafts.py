"""Drafts: cheap guesses of the next tokens, for a language model to accept or to refuse.

A draft is a dataclass registered as a pytree, its parameters the data. What it
remembers from round to round is a plain value that its methods take and return.
Drafts that read the model's hidden states are in `decoding.head_drafts`.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxmodels.decoding.choice import Choice
from jaxmodels.decoding.states import is_cached, keep_first, shorten_all
from jaxmodels.ops.candidate_tree import CandidateTree, chain


class Text(NamedTuple):
    """All that is certain so far, of every row of a batch equally long.

    Fields:
      tokens: the prompt, what was generated, and room; what is in there means nothing.
      length: how many are certain. A model has seen all but the last of them.
      padding: how many of them are padding, which is on the left.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, ""]
    padding: Int[Array, "B"]

    def part(self, start: int | Int[Array, ""], size: int) -> Int[Array, "B T"]:
        """`size` tokens from the place `start` on."""
        return lax.dynamic_slice_in_dim(self.tokens, start, size, axis=1)

    def positions(self, places: Int[Array, "T"], context: int | None) -> Int[Array, "B T"]:
        """Those of tokens at some places, for a model of a context.

        What lies beyond the context is never asked for, but guesses may reach there.
        """
        found = places[None, :] - self.padding[:, None]
        return found if context is None else jnp.minimum(found, context - 1)


class Guesses(NamedTuple):
    """Candidates for a tree.

    Fields:
      tokens: of its nodes but the root.
      probabilities: of the vocabulary, what each was drawn from; None if guesses follow
        from the text with certainty.
    """

    tokens: Int[Array, "B M"]
    probabilities: Float[Array, "B M V"] | None


@runtime_checkable
class Draft(Protocol):
    """What `speculative_generate` asks of a draft.

    Attributes:
      tree: shape of its guesses.
      vocab_size, context: that it was made for, or None for any.
    """

    tree: CandidateTree
    vocab_size: int | None
    context: int | None

    def start(
        self,
        text: Text,
        segment_ids: Int[Array, "B T"] | None,
        hidden: Float[Array, "B T D"],
        max_length: int,
    ) -> Any:
        """What is remembered of the prompts.

        Args:
          text: the prompts, and the token after them.
          segment_ids: of the prompts, 0 on padding; None without any.
          hidden: the model's, of the prompts.
          max_length: how many tokens there will ever be, refused guesses included.
        """

    def propose(
        self, memory: Any, text: Text, choice: Choice, key: Key[Array, ""] | None
    ) -> tuple[Guesses, Any]:
        """Guesses what follows the text.

        Args:
          memory: of all rounds before.
          text: what is certain.
          choice: how tokens are drawn from the model.
          key: of draws; None if nothing is drawn.

        Returns:
          The guesses, and what `follow` gets as memory.
        """

    def follow(
        self, memory: Any, text: Text, hidden: Float[Array, "B P D"], count: Int[Array, ""]
    ) -> Any:
        """Takes in how a round has ended.

        Args:
          memory: from `propose`.
          text: what is certain now, with `count` more tokens than before.
          hidden: the model's, of the token that was the last before this round, and of
            the accepted guesses after it; only the first `count` mean anything.
          count: how many tokens the text has won.
        """


def pick(
    choice: Choice, logits: Float[Array, "B V"], key: Key[Array, ""] | None
) -> tuple[Int[Array, "B"], Float[Array, "B V"] | None]:
    """A draft's guess by the rule that the model's tokens are drawn by, and its distribution."""
    token = choice.token(logits, None, key)
    if choice.temperature is None:
        return token, None
    return token, jax.nn.softmax(choice.filtered(logits, None), axis=-1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["model", "length"],
)
@dataclasses.dataclass(frozen=True)
class ModelDraft:
    """A smaller language model, which draws a chain of guesses.

    Attributes:
      model: a `LanguageModel` of the same vocabulary.
      variables: its parameters as {"params": ...}, with other collections it has.
      length: guesses a round.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
    Decoding" (arXiv:2211.17192).
    """

    model: Any
    variables: Mapping[str, Any]
    length: int = 4

    @property
    def tree(self) -> CandidateTree:
        """A chain."""
        return chain(self.length)

    @property
    def vocab_size(self) -> int:
        """The model's."""
        return self.model.vocab_size

    @property
    def context(self) -> int | None:
        """The model's."""
        return self.model.context

    def start(self, text, segment_ids, hidden, max_length):
        """The model's state after the prompts; see `Draft`."""
        batch, length = hidden.shape[:2]
        state = self.model.init_state(batch, max_length)
        _, state = self._read(text.tokens[:, :length], None, state, segment_ids)
        return shorten_all(state, length - 1) if is_cached(state) else state

    # After a round in which all guesses are accepted, the model has not read the last of
    # them. A cache therefore always lacks one token more than it must, so that a round
    # begins with two tokens at once; a state that is computed again anyway does not.
    def propose(self, memory, text, choice, key):
        """Draws token after token; see `Draft`."""
        first = 2 if is_cached(memory) else 1
        places = text.length - first + jnp.arange(first)
        keys = [None] * self.length if key is None else jax.random.split(key, self.length)

        def draw(state, tokens, places, key):
            positions = text.positions(places, self.context)
            hidden, state = self._read(tokens, positions, state)
            logits = self.model.apply(self.variables, hidden[:, -1], method="logits")
            return pick(choice, logits, key), state

        guess, state = draw(memory, text.part(places[0], first), places, keys[0])
        guesses = [guess]
        for step in range(1, self.length):
            guess, state = draw(state, guess[0][:, None], places[-1:] + step, keys[step])
            guesses.append(guess)
        guesses = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *guesses)
        return Guesses(*guesses), state if is_cached(state) else memory

    def follow(self, memory, text, hidden, count):
        """Forgets what was refused; see `Draft`."""
        if is_cached(memory):
            return shorten_all(memory, text.length - 2)
        places = text.length - 1 - count + jnp.arange(self.length + 1)
        tokens = text.part(places[0], self.length + 1)
        positions = text.positions(places, self.context)
        return keep_first(self._read, memory, tokens, positions, count)

    def _read(self, tokens, positions, state, segment_ids=None):
        return self.model.apply(
            self.variables, tokens, positions, segment_ids, state, method="hidden"
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["length", "longest"],
)
@dataclasses.dataclass(frozen=True)
class NgramDraft:
    """What followed the last tokens where they stood before: prompt look-up.

    The place whose last tokens agree with the text's end the furthest, up to
    `longest` tokens, is gone on with; of several the latest.

    Attributes:
      length: guesses a round.
      longest: tokens of agreement beyond which the latest place counts.

    Source: Yang et al. 2023, "Inference with Reference" (arXiv:2304.04487), section 3;
    with the text itself as reference as in Saxena's prompt look-up decoding.
    """

    length: int = 8
    longest: int = 6

    vocab_size = None
    context = None

    @property
    def tree(self) -> CandidateTree:
        """A chain."""
        return chain(self.length)

    def start(self, text, segment_ids, hidden, max_length):
        """Nothing; the text is all."""

    def propose(self, memory, text, choice, key):
        """Reads on at the best place; see `Draft`."""
        tokens, places = text.tokens, jnp.arange(text.tokens.shape[1])

        def same(back):
            """Whether the token `back` before each place is the one before the text's end."""
            shifted = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)
            last = text.part(jnp.maximum(text.length - back, 0), 1)
            return shifted[:, : tokens.shape[1]] == last

        agree = jnp.stack([same(back) for back in range(1, self.longest + 1)])
        score = jnp.sum(jnp.cumprod(agree, axis=0), axis=0) * len(places) + places[None]
        allowed = (places > 0) & (places < text.length)
        best = jnp.argmax(jnp.where(allowed[None], score, -1), axis=1)[:, None]
        # What repeats up to the end is taken to repeat on.
        steps = jnp.arange(self.length)[None] % jnp.maximum(text.length - best, 1)
        return Guesses(jnp.take_along_axis(tokens, best + steps, axis=1), None), memory

    def follow(self, memory, text, hidden, count):
        """Nothing; the text is all."""
