"""What all language models share: a call, hidden states, a state, and the training loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Key

from jaxmodels.layers.experts import MixtureOfExperts
from jaxmodels.layers.normalization import TOKEN_NORMS
from jaxmodels.layers.repeated_blocks import require_policy, run_listed
from jaxmodels.ops.cross_entropy import chunked_cross_entropy


class DecoderBlock(nn.Module):
    """A mixer and a feed-forward, each added to what comes in and after a norm of it.

    Attributes:
      mixer: a sequence mixer.
      mlp: a feed-forward, any module from (B, T, D) to (B, T, D). Experts count
        what has a segment id above 0, which padding has not.
      norm: "rms" or "layer".
      norm_eps: added to the mean square or the variance.
      dtype: of the computation.
    """

    mixer: nn.Module
    mlp: nn.Module
    norm: str = "rms"
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """As a mixer: returns the tokens after this block and the mixer's state."""
        h = make_norm(self.norm, self.norm_eps, self.dtype, "mixer_norm")(x)
        h, state = self.mixer(h, positions, segment_ids, state, train)
        x = x + h
        h = make_norm(self.norm, self.norm_eps, self.dtype, "mlp_norm")(x)
        if isinstance(self.mlp, MixtureOfExperts) and segment_ids is not None:
            return x + self.mlp(h, segment_ids > 0), state
        return x + self.mlp(h), state


def make_norm(norm: str, epsilon: float, dtype: Dtype, name: str | None = None) -> nn.Module:
    """The norm of a name, "rms" or "layer"; `name` is None inside `setup`.

    Raises:
      ValueError: no such norm.
    """
    if norm not in TOKEN_NORMS:
        raise ValueError(f'make_norm: norm={norm!r} is neither "rms" nor "layer"')
    return TOKEN_NORMS[norm](epsilon=epsilon, dtype=dtype, name=name)


class LanguageModel(nn.Module):
    """Base of the language models: tokens to the logits of the tokens that follow.

    A subclass has the fields `vocab_size`, `width`, `depth`, `context` (the longest
    sequence that it was made for, or None), `remat`, `scan` and `dtype`, a method
    `mixers`, and a `setup` that makes `embed`, `block` (a list), `final_norm` and `head`,
    which is None where the table of embeddings is the output matrix too.

    `remat` is what the backward pass computes again, a policy of
    `ops.rematerialisation`. With another one than "none", or with `scan`, equal
    neighbouring blocks are one scan over a stack of their parameters: a copy of them, and
    the time to trace one block. Not in decoding, where a state goes through them.
    """

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Sequence[Any] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T V"], tuple[Any, ...] | None]:
        """Predicts the token after each one.

        Args:
          tokens: in [0, vocab_size).
          positions, segment_ids: as for a mixer (`jaxmodels.layers.mixers`); 0 is the
            segment of padding, which the balance of experts does not count.
          state: one value a layer, from `init_state` or the call before.
          train: passed on to the mixers.

        Returns:
          Logits in float32, and the new state, or None without one.

        Raises:
          ValueError: the state is not one value a layer; or as the mixers.
        """
        hidden, state = self.hidden(tokens, positions, segment_ids, state, train)
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Sequence[Any] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...] | None]:
        """The vectors that `logits` reads, and the new state; arguments as of a call."""
        states = [None] * self.depth if state is None else self._a_layer("state", state)
        x = self.embedded(tokens, positions, segment_ids, state)
        x, after = self.through(self.block, x, positions, segment_ids, states, train)
        return self.final_norm(x), None if state is None else after

    def through(
        self,
        blocks: Sequence[nn.Module],
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        states: Sequence[Any],
        train: bool,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """What some of the blocks make of x, and their new states.

        Without states, and with another `remat` than "none" or with `scan`, equal
        neighbours are one scan over their stacked parameters.
        """
        require_policy(type(self).__name__, self.remat)
        if (self.scan or self.remat != "none") and all(before is None for before in states):

            def call(block, x):
                return block(x, positions, segment_ids, None, train)[0]

            return run_listed(call, blocks, x, self.remat), (None,) * len(blocks)
        after = []
        for block, before in zip(blocks, states, strict=True):
            x, new = block(x, positions, segment_ids, before, train)
            after.append(new)
        return x, tuple(after)

    def embedded(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        state: Sequence[Any] | None,
    ) -> Float[Array, "B T D"]:
        """What the first block sees; a model whose positions are vectors adds them here."""
        del positions, segment_ids, state
        return self.embed(tokens)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of the next token, in float32."""
        out = self.embed.attend(hidden) if self.head is None else self.head(hidden)
        return out.astype(jnp.float32)

    @nn.nowrap
    def mixers(self) -> list[nn.Module]:
        """A mixer a layer, of no parent."""
        raise NotImplementedError(f"{type(self).__name__} has no mixers")

    # Linen would have mixers made here belong to a model that is not being applied.
    @nn.nowrap
    def init_state(self, batch: int, max_length: int, dtype: Dtype | None = None) -> tuple:
        """An empty state for sequences of at most `max_length` tokens, one value a layer.

        Args:
          batch: sequences.
          max_length: tokens of each, prompt and generated together.
          dtype: of caches; None is the model's.
        """
        return tuple(m.init_state(batch, max_length, dtype or self.dtype) for m in self.mixers())

    @nn.nowrap
    def output_kernel(self, params: Mapping[str, Any]) -> Float[Array, "D V"]:
        """The matrix from hidden states to logits."""
        if "head" in params:
            return params["head"]["kernel"]
        return params["embed"]["embedding"].T

    @nn.nowrap
    def loss(
        self,
        params: Mapping[str, Any],
        batch: Mapping[str, Any],
        key: Key[Array, ""],
        model_state: Mapping[str, Any] | None = None,
        *,
        z_loss: float = 0.0,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Mapping[str, Any]]:
        """The training loss, in the form that `training.make_step` takes.

        loss = sum weights * cross entropy / sum weights + what layers have sown

        All logits are never held at once. Layers may sow scalars in the collection
        "losses" (the balance of experts), which are added.

        Args:
          params: the parameters.
          batch: "tokens" and "targets" (B, T); and, if the batch is packed,
            "segment_ids" and "positions" (B, T), and "weights" (B, T), 0 where a
            target is not a real one.
          key: of what training draws.
          model_state: other variables by collection, such as the "router" of experts.
          z_loss: weight of the squared log-normaliser, as PaLM has it.

        Returns:
          The loss, its terms by name, and the new model_state.

        Raises:
          ValueError: the batch lacks tokens or targets, or shapes disagree.
        """
        self._require(batch)
        model_state = dict(model_state or {})
        (hidden, _), sown, changed = self.in_training(
            {"params": params, **model_state},
            key,
            "hidden",
            batch["tokens"],
            batch.get("positions"),
            batch.get("segment_ids"),
        )
        loss, terms = chunked_cross_entropy(
            hidden,
            self.output_kernel(params).astype(hidden.dtype),
            batch["targets"],
            batch.get("weights"),
            z_loss=z_loss,
        )
        return loss + sum(sown.values()), {**terms, **sown}, {**model_state, **changed}

    @nn.nowrap
    def in_training(
        self, variables: Mapping[str, Any], key: Key[Array, ""], method: str, *arguments: Any
    ) -> tuple[Any, dict[str, Float[Array, ""]], dict[str, Any]]:
        """Calls a method as training does.

        Args:
          variables: all of which but the parameters may change.
          key: of what training draws.
          method: takes `train`.
          *arguments: of the method.

        Returns:
          What the method returns; the sums over all layers of the losses that they have
          sown, by name; and the changed variables.
        """
        mutable = ["losses", *(kind for kind in variables if kind != "params")]
        out, changed = self.apply(
            variables, *arguments, train=True, method=method, rngs={"dropout": key}, mutable=mutable
        )
        changed, sums = dict(changed), {}
        for path, values in flatten_dict(dict(changed.pop("losses", {}))).items():
            sums[path[-1]] = sums.get(path[-1], 0.0) + sum(jax.tree.leaves(values))
        return out, sums, changed

    @nn.nowrap
    def _require(self, batch: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if missing := {"tokens", "targets"} - {*batch}:
            raise ValueError(
                f"{name}: the batch has no {', '.join(map(repr, sorted(missing)))}, only "
                f"{sorted(batch)}; use a data set of text"
            )
        shapes = {
            key: batch[key].shape
            for key in ("targets", "weights", "positions", "segment_ids")
            if key in batch
        }
        if wrong := {k: s for k, s in shapes.items() if s != batch["tokens"].shape}:
            raise ValueError(
                f"{name}: batch['tokens'] is {batch['tokens'].shape}, but {wrong}; all are (B, T)"
            )

    @nn.nowrap
    def _a_layer(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        if len(values) != self.depth:
            raise ValueError(
                f"{type(self).__name__}: {name} has {len(values)} entries for "
                f"depth={self.depth}; give one, or one a layer"
            )
        return values
