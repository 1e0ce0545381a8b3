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
    """The first module of a `DeepseekV3` that looks ahead, used again for every guess.

    The module reads the model's vector of each token and the token after it. For the
    guesses after the first, its own last vector stands for the model's.

    Attributes:
      model: a `DeepseekV3`, the same that generates.
      variables: its parameters, as {"params": ...}, with other collections it has.
      length: guesses a round; the paper's is 1.

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", sections 2.2 and 5.4.3
    (arXiv:2412.19437); again and again as in Li et al. 2024, "EAGLE", section 4.1
    (arXiv:2401.15077).
    """

    model: Any
    variables: Mapping[str, Any]
    length: int = 1

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
        """The module's state, and its vector of the last token; see `Draft`."""
        batch, length = hidden.shape[:2]
        state = self.model.init_ahead_state(batch, max_length)[0]
        tokens = text.part(1, length)
        vectors, state = self._ahead(hidden, tokens, None, state, segment_ids)
        return state, vectors[:, -1]

    def propose(self, memory, text, choice, key):
        """Draws token after token; see `Draft`."""
        keys = [None] * self.length if key is None else jax.random.split(key, self.length)
        (state, vector), guesses = memory, []
        for step in range(self.length):
            if step:
                place = text.length - 2 + jnp.arange(step, step + 1)
                positions = text.positions(place, self.context)
                token = guesses[-1][0][:, None]
                vectors, state = self._ahead(vector[:, None], token, positions, state)
                vector = vectors[:, 0]
            logits = self.model.apply(self.variables, vector, method="logits")
            guesses.append(pick(choice, logits, keys[step]))
        return Guesses(*jax.tree.map(lambda *x: jnp.stack(x, axis=1), *guesses)), state

    def follow(self, memory, text, hidden, count):
        """Reads the accepted tokens with the model's own vectors; see `Draft`."""
        first, number = text.length - count, hidden.shape[1]
        places = first - 1 + jnp.arange(number)
        positions = text.positions(places, self.context)
        state = shorten(memory, first - 1)
        vectors, state = self._ahead(hidden, text.part(first, number), positions, state)
        return shorten(state, text.length - 1), jnp.take(vectors, count - 1, axis=1)

    def _ahead(self, hidden, tokens, positions, state, segment_ids=None):
        places = positions, segment_ids
        return self.model.apply(
            self.variables, hidden, tokens, 0, *places, state, method="predict_ahead"
        )


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
