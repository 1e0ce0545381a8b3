"""Several tokens predicted at once, by parallel heads on the trunk of any language model.

Paper    Gloeckle et al. 2024, "Better & Faster Large Language Models via
         Multi-token Prediction", section 2 (arXiv:2404.19737): n heads, each a
         block of its own on what the trunk shares, with one norm and one
         unembedding for all; the sequential backward pass of figure 2.
Differs  the trunk is any `LanguageModel`, whose last block is the first head, so
         that its parameters alone are the plain model for the next token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Key

from jaxmodels.models.language.language_model import LanguageModel
from jaxmodels.ops.cross_entropy import chunked_cross_entropy
from jaxmodels.ops.segments import document_index
from jaxmodels.ops.sum_in_turn import sum_in_turn


class MultiToken(LanguageModel):
    """A language model with heads that predict the second, third ... token as well.

    z = all blocks of the trunk but the last,   h_i = norm(block_i(z))
    p(token t + i) = softmax(unembedding h_i),  i = 1 ... heads

    A call, `hidden`, `logits` and the state are the trunk's and cost what they cost
    there; the other heads serve training. With `drafting` they serve decoding too:
    `hidden` then holds the vectors of all heads one after the other, (B, T, n D), and
    the state has a value a head, so that whoever keeps or takes back the model's
    state does so with the heads'. `logits` reads the first D, so hidden[..., i D:]
    gives head i + 1.

    Attributes:
      trunk: the model for the next token; its last block is the first head.
      heads: n, tokens predicted at each place.
      drafting: gives the vectors of all heads, for a draft to guess from.
    """

    trunk: LanguageModel
    heads: int = 4
    drafting: bool = False

    def setup(self):
        """Makes the blocks of the other heads, alike to the trunk's last one."""
        if self.heads < 1 or self.trunk.depth < 2:
            raise ValueError(
                f"MultiToken: heads={self.heads} must be at least 1, and the trunk's "
                f"depth={self.trunk.depth} at least 2, of which the last is the first head"
            )
        self.block_ahead = [self.trunk.block[-1].copy() for _ in range(1, self.heads)]

    @property
    def vocab_size(self) -> int:
        """The trunk's."""
        return self.trunk.vocab_size

    @property
    def width(self) -> int:
        """The trunk's."""
        return self.trunk.width

    @property
    def depth(self) -> int:
        """The trunk's, its last block included."""
        return self.trunk.depth

    @property
    def context(self) -> int | None:
        """The trunk's."""
        return self.trunk.context

    @property
    def dtype(self) -> Dtype:
        """The trunk's."""
        return self.trunk.dtype

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Sequence[Any] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T M"], tuple[Any, ...] | None]:
        """The vectors of the first head or of all, and the new state; arguments as of a call."""
        if not self.drafting and not self.is_initializing():
            return self.trunk.hidden(tokens, positions, segment_ids, state, train)
        first, last = None, [None] * self.heads
        if state is not None:
            self._require_states(state)
            first, last = state[: self.depth - 1], state[self.depth - 1 :]
        places = positions, segment_ids
        shared, after = self.shared(tokens, *places, first, train)
        ends = [self.head(i, shared, *places, before, train) for i, before in enumerate(last)]
        hidden, last = zip(*ends, strict=True)
        return jnp.concatenate(hidden, axis=-1), None if state is None else (*after, *last)

    def logits(self, hidden: Float[Array, "*B M"]) -> Float[Array, "*B V"]:
        """Scores of the token that a head's vector, the first of `hidden`, is for; float32."""
        return self.trunk.logits(hidden[..., : self.width])

    def shared(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        state: Sequence[Any] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """What all heads read, and the state of the blocks before them."""
        states = [None] * (self.depth - 1) if state is None else state
        x = self.trunk.embedded(tokens, positions, segment_ids, state)
        blocks = self.trunk.block[:-1]
        return self.trunk.through(blocks, x, positions, segment_ids, states, train)

    def head(
        self,
        number: int,
        shared: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        state: Any,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One head's vectors and its state; number 0 is for the next token."""
        block = self.block_ahead[number - 1] if number else self.trunk.block[-1]
        x, state = block(shared, positions, segment_ids, state, train)
        return self.trunk.final_norm(x), state

    @nn.nowrap
    def mixers(self) -> list[nn.Module]:
        """A mixer a value of the state, of no parent; with `drafting` those of all heads."""
        others = range(self.heads - 1 if self.drafting else 0)
        return [*self.trunk.mixers(), *(self.trunk.mixers()[-1] for _ in others)]

    @nn.nowrap
    def output_kernel(self, params: Mapping[str, Any]) -> Float[Array, "D V"]:
        """The matrix from any head's vectors to logits."""
        return self.trunk.output_kernel(params["trunk"])

    @nn.nowrap
    def loss(
        self,
        params: Mapping[str, Any],
        batch: Mapping[str, Array],
        key: Key[Array, ""],
        model_state: Mapping[str, Any] | None = None,
        *,
        z_loss: float = 0.0,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Mapping[str, Any]]:
        """The sum of all heads' losses; arguments and results as of `LanguageModel.loss`.

        Each head's backward pass runs as soon as its loss is known, so that one head's
        activations are held at a time.

        Terms are named as there for the first head, "cross_entropy" for instance,
        and for the others "cross_entropy_2" ....
        """
        self._require(batch)
        places = batch.get("positions"), batch.get("segment_ids")
        model_state = dict(model_state or {})

        def head_loss(shared, block, rest):
            (hidden, output), (targets, key, state) = shared, rest
            variables = {"params": {"trunk": output}, **{name: {} for name in state}}
            variables = self._with_block(variables, 0, {"params": block, **state})
            # Whichever head it is, it runs as the first one.
            (out, _), sown, state = self.in_training(
                variables, key, "head", 0, hidden, *places, None
            )
            kernel = self.output_kernel(variables["params"]).astype(out.dtype)
            loss, terms = chunked_cross_entropy(out, kernel, *targets, z_loss=z_loss)
            return loss + sum(sown.values()), ({**terms, **sown}, self._block_of(state, 0))

        keys = jax.random.split(key, 1 + self.heads)
        variables = {"params": params, **model_state}
        (hidden, _), sown, changed = self.in_training(
            variables, keys[0], "shared", batch["tokens"], *places
        )
        heads = range(self.heads)
        blocks = _stack([self._block_of(variables, number) for number in heads])
        rest = _stack([targets_ahead(batch, number) for number in heads]), keys[1:]
        shared = hidden, _output(params["trunk"])
        loss, (terms, states) = sum_in_turn(
            head_loss, shared, blocks.pop("params"), (*rest, blocks)
        )
        model_state |= changed
        for number in heads:
            state = jax.tree.map(lambda x, i=number: x[i], states)
            model_state = self._with_block(model_state, number, state)
        return loss + sum(sown.values()), _name_terms(sown, terms), model_state

    @nn.nowrap
    def _require_states(self, state: Sequence[Any]) -> None:
        if len(state) != (expected := self.depth + self.heads - 1):
            raise ValueError(
                f"MultiToken: the state has {len(state)} values, but drafting with "
                f"depth={self.depth} and heads={self.heads} needs {expected}; use init_state of "
                f"the drafting model"
            )

    @nn.nowrap
    def _block_of(self, variables: Mapping[str, Any], head: int) -> dict[str, Any]:
        """What a head's block has, by collection."""
        if head:
            return {c: tree.get(f"block_ahead_{head - 1}", {}) for c, tree in variables.items()}
        last = f"block_{self.depth - 1}"
        return {c: tree.get("trunk", {}).get(last, {}) for c, tree in variables.items()}

    @nn.nowrap
    def _with_block(self, variables: Mapping[str, Any], head: int, block: dict[str, Any]) -> dict:
        """The variables with those of a head's block exchanged."""
        last = f"block_{self.depth - 1}"
        changed = dict(variables)
        for name, own in block.items():
            tree = variables[name]
            if own and head:
                changed[name] = {**tree, f"block_ahead_{head - 1}": own}
            elif own:
                changed[name] = {**tree, "trunk": {**tree.get("trunk", {}), last: own}}
        return changed


def targets_ahead(
    batch: Mapping[str, Array], ahead: int
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Targets `ahead` places further on, and their weights, 0 where the document has ended.

    Args:
      batch: "targets", and if there are "weights" and "segment_ids", all (B, T).
      ahead: 0 for the targets as they are.
    """
    targets = batch["targets"]
    weights = batch.get("weights", jnp.ones(targets.shape, jnp.float32))
    documents = document_index(batch.get("segment_ids", jnp.zeros_like(targets)))

    def shift(x):
        x = x[:, ahead:]
        return jnp.pad(x, ((0, 0), (0, targets.shape[1] - x.shape[1])))

    return shift(targets), jnp.where(shift(documents) == documents, shift(weights), 0.0)


def _name_terms(sown: dict[str, Array], of_heads: dict[str, Array]) -> dict[str, Array]:
    """The terms of all heads, numbered from the second on; those of the first join the trunk's."""
    terms = dict(sown)
    for name, values in of_heads.items():
        terms[name] = terms.get(name, 0.0) + values[0]
        terms |= {f"{name}_{number}": value for number, value in enumerate(values[1:], 2)}
    return terms


def _output(trunk: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that all heads read out with."""
    names = ("final_norm", "head" if "head" in trunk else "embed")
    return {name: trunk[name] for name in names}


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
