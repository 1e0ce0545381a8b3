"""Drafts that read the next tokens off the model's own vectors, through heads beside it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxmodels.decoding.choice import Choice
from jaxmodels.decoding.drafts import Guesses, pick
from jaxmodels.layers.mixers.cache import shorten
from jaxmodels.ops.candidate_tree import CandidateTree, chain


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["heads", "tree", "drawn"],
)
@dataclasses.dataclass(frozen=True)
class MedusaDraft:
    """Medusa heads on the vector of the last token that the model has read.

    Attributes:
      heads: a `MedusaHeads`.
      variables: its parameters, as {"params": ...}.
      tree: of candidates, no deeper than there are heads.
      drawn: whether guesses are drawn where the model's tokens are, and not the
        likeliest. Both are exact.

    Raises:
      ValueError: the tree is deeper than the heads are many.

    Source: Cai et al. 2024, "Medusa", section 2.1 (arXiv:2401.10774).
    """

    heads: Any
    variables: Mapping[str, Any]
    tree: CandidateTree
    drawn: bool = False

    context = None

    def __post_init__(self):
        _require_heads("MedusaDraft", self.tree, self.heads.heads)

    @property
    def vocab_size(self) -> int:
        """The heads'."""
        return self.heads.vocab_size

    def start(self, text, segment_ids, hidden, max_length):
        """The vector of the last token; see `Draft`."""
        return hidden[:, -1]

    def propose(self, memory, text, choice, key):
        """The heads' candidates; see `Draft`."""
        logits = self.heads.apply(self.variables, memory)
        return candidates(self.tree, logits, choice, key if self.drawn else None), memory

    def follow(self, memory, text, hidden, count):
        """The vector of the last accepted guess; see `Draft`."""
        return jnp.take(hidden, count - 1, axis=1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["model", "tree", "drawn"],
)
@dataclasses.dataclass(frozen=True)
class MultiTokenDraft:
    """The other heads of the `MultiToken` model that judges them.

    Attributes:
      model: a `MultiToken` with `drafting`, the same that generates.
      variables: its parameters, as {"params": ...}.
      tree: of candidates; None is a chain of all heads.
      drawn: as of `MedusaDraft`.

    Raises:
      ValueError: there is one head alone, or the tree is deeper than the others are many.

    Source: Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token
    Prediction", section 3.2 (arXiv:2404.19737).
    """

    model: Any
    variables: Mapping[str, Any]
    tree: CandidateTree | None = None
    drawn: bool = False

    def __post_init__(self):
        if self.tree is None:
            object.__setattr__(self, "tree", chain(self.model.heads - 1))
        _require_heads("MultiTokenDraft", self.tree, self.model.heads - 1)

    @property
    def vocab_size(self) -> int:
        """The model's."""
        return self.model.vocab_size

    @property
    def context(self) -> int | None:
        """The model's."""
        return self.model.context

    def start(self, text, segment_ids, hidden, max_length):
        """What the other heads have of the last token; see `Draft`."""
        if hidden.shape[-1] != self.model.heads * self.model.width:
            raise ValueError(
                f"MultiTokenDraft: hidden {hidden.shape} is not of {self.model.heads} heads of "
                f"width {self.model.width}; generate with the draft's model and drafting=True"
            )
        return hidden[:, -1]

    def propose(self, memory, text, choice, key):
        """The heads' candidates; see `Draft`."""
        heads = memory.reshape(len(memory), -1, self.model.width)[:, 1:]
        logits = self.model.apply(self.variables, heads, method="logits")
        return candidates(self.tree, logits, choice, key if self.drawn else None), memory

    def follow(self, memory, text, hidden, count):
        """What the other heads have of the last accepted guess; see `Draft`."""
        return jnp.take(hidden, count - 1, axis=1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["model", "length"],
)
@dataclasses.dataclass(frozen=True)
class ModuleDraft:
    """The modules of a `DeepseekV3` that look ahead, one after the other for each guess.

    Module k reads, at a token's place, the vector that the model or module k - 1 has there
    and the token k + 1 places on. Guesses further on than there are modules come from the
    last one again, with its own last vector in place of what it would read.

    Attributes:
      model: a `DeepseekV3`, the same that generates.
      variables: its parameters, as {"params": ...}, with other collections it has.
      length: guesses a round; the paper's is 1, of one module.

    Raises:
      ValueError: the model has no such module.

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", sections 2.2 and 5.4.3
    (arXiv:2412.19437); again and again as in Li et al. 2024, "EAGLE", section 4.1
    (arXiv:2401.15077).
    """

    model: Any
    variables: Mapping[str, Any]
    length: int = 1

    def __post_init__(self):
        if self.model.num_ahead < 1:
            raise ValueError(
                f"ModuleDraft: the model has num_ahead={self.model.num_ahead} modules that look "
                f"ahead; it needs at least one"
            )

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

    # What is remembered: every module's state, and its vector of the last token it can have
    # read. The n-th entry of all states has the same token, so that of module k is of the
    # place n - k: its first k entries are of no place, and no one sees them.
    def start(self, text, segment_ids, hidden, max_length):
        """The modules' states after the prompts; see `Draft`."""
        states = self.model.init_ahead_state(len(hidden), max_length)
        nothing = (jnp.zeros_like(hidden[:, 0]),) * len(states)
        return self.follow((states, nothing), text, hidden, jnp.int32(hidden.shape[1]))

    def propose(self, memory, text, choice, key):
        """Draws token after token; see `Draft`."""
        keys = [None] * self.length if key is None else jax.random.split(key, self.length)
        states, last = list(memory[0]), memory[1]
        vectors, vector, guesses = last[0][:, None][:, :0], last[0], []
        for step in range(self.length):
            if step:
                number = min(step, len(states) - 1)
                if number == step:
                    # None of the guesses has been read by this one yet.
                    read, inputs = step, jnp.concatenate([last[step - 1][:, None], vectors], axis=1)
                else:
                    read, inputs = 1, vector[:, None]
                tokens = jnp.stack([token for token, _ in guesses[-read:]], axis=1)
                first = text.length - 1 + step - read
                vectors, states[number] = self._ahead(
                    number, inputs, tokens, text, first, states[number]
                )
                vector = vectors[:, -1]
            logits = self.model.apply(self.variables, vector, method="logits")
            guesses.append(pick(choice, logits, keys[step]))
        stacked = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *guesses)
        return Guesses(*stacked), (tuple(states), last)

    def follow(self, memory, text, hidden, count):
        """Reads the accepted tokens with the model's own vectors; see `Draft`."""
        first = text.length - count
        tokens, vectors = text.part(first, hidden.shape[1]), hidden
        states, last = [], []
        for number, state in enumerate(memory[0]):
            if number:
                vectors = jnp.concatenate([memory[1][number - 1][:, None], vectors[:, :-1]], axis=1)
            state = shorten(state, first - 1)
            vectors, state = self._ahead(number, vectors, tokens, text, first - 1, state)
            states.append(shorten(state, text.length - 1))
            last.append(jnp.take(vectors, count - 1, axis=1))
        return tuple(states), tuple(last)

    def _ahead(self, number, inputs, tokens, text, first, state):
        """A module's vectors and state, its entries from `first` on."""
        places = first - number + jnp.arange(tokens.shape[1])
        positions = text.positions(places, self.context)
        real = positions >= 0
        options = jnp.maximum(positions, 0), real.astype(jnp.int32), state
        vectors, state = self.model.apply(
            self.variables, inputs, tokens, number, *options, method="predict_ahead"
        )
        # A row without any real entry would go on with the others as its text.
        documents = jnp.where(real[:, -1:], state.documents, -1)
        return vectors, state._replace(documents=documents)


def candidates(
    tree: CandidateTree,
    logits: Float[Array, "B N V"],
    choice: Choice,
    key: Key[Array, ""] | None,
) -> Guesses:
    """The tokens of a tree from heads that each know one place.

    The guesses after a node are those of the head for its depth, best first: the
    likeliest tokens, or with a key, tokens drawn without putting back.

    Args:
      tree: no deeper than heads are many.
      logits: of each head.
      choice: filters of the distribution that is drawn from.
      key: None takes the likeliest.
    """
    depths, ranks = tree.depths[1:] - 1, tree.ranks[1:]
    number = int(ranks.max()) + 1
    if key is None:
        _, best = jax.lax.top_k(logits, number)
        return Guesses(best[:, depths, ranks], None)
    logits = choice.filtered(logits, None)
    # The largest of logits with Gumbel noise is a draw; the next largest, one of the rest.
    _, drawn = jax.lax.top_k(logits + jax.random.gumbel(key, logits.shape), number)
    return Guesses(drawn[:, depths, ranks], _of_the_rest(logits, drawn)[:, depths, ranks])


def _of_the_rest(
    logits: Float[Array, "B N V"], drawn: Int[Array, "B N R"]
) -> Float[Array, "B N R V"]:
    """What each was drawn from: all but those drawn before it."""
    taken = jax.nn.one_hot(drawn, logits.shape[-1])
    before = jnp.cumsum(taken, axis=2) - taken
    left = jnp.where(before > 0, -jnp.inf, logits[:, :, None])
    some = jnp.any(left > -jnp.inf, axis=-1, keepdims=True)
    # Where filters leave nothing, the token is no draw but certain.
    return jnp.where(some, jax.nn.softmax(jnp.where(some, left, 0.0), axis=-1), taken)


def _require_heads(name: str, tree: CandidateTree, heads: int) -> None:
    if tree.depth > heads:
        raise ValueError(
            f"{name}: a tree of depth {tree.depth} needs as many heads, not {heads}; cut the tree "
            f"or train more heads"
        )
