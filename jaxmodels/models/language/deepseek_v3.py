"""DeepSeek-V3: latent attention, many small experts, and modules that look further ahead.

Paper    DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2
         (arXiv:2412.19437): multi-head latent attention (2.1.1), DeepSeekMoE balanced
         by a bias instead of a loss (2.1.2), multi-token prediction (2.2).
Differs  as the published weights and code have it: the modules read the hidden states
         after the final norm, end with a norm of their own, and their projection takes
         the embedding first. A module's loss is the mean over the targets it has.
Weights  `transformers` folders of model type "deepseek_v3", both ways.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Key

from jaxmodels.layers.experts import MixtureOfExperts
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mixers.latent import LatentMixer
from jaxmodels.layers.mlp import GatedMlp
from jaxmodels.layers.positions import Rotary
from jaxmodels.layers.rotary_scaling import Scaling, Yarn
from jaxmodels.models.language.language_model import (
    DecoderBlock,
    LanguageModel,
    make_norm,
)
from jaxmodels.models.language.multi_token import targets_ahead
from jaxmodels.ops.cross_entropy import chunked_cross_entropy
from jaxmodels.ops.segments import document_index
from jaxmodels.registry import register_model

_INIT = nn.initializers.normal(0.006)


class MultiTokenModule(nn.Module):
    """From hidden states and the tokens k places on, to the hidden states one place on.

    h^k_i = norm(TRM(W [norm(Emb(t_(i+k))); norm(h^(k-1)_i)]))

    Attributes:
      block: TRM, a decoder block.
      norm_eps: of the norms.
      dtype: of the computation.

    Source: equations 21 and 22 of the paper.
    """

    block: nn.Module
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns h^k, ready for the head, and the block's state.

        Args:
          hidden: h^(k-1), of the main model or of the module before.
          embedded: of the tokens k places after those of `hidden`.
          positions, segment_ids, state, train: as for a mixer; those of `hidden`.
        """

        def norm(x, name):
            return make_norm("rms", self.norm_eps, self.dtype, name)(x)

        both = jnp.concatenate([norm(embedded, "embed_norm"), norm(hidden, "hidden_norm")], -1)
        project = Linear(
            hidden.shape[-1], use_bias=False, kernel_init=_INIT, dtype=self.dtype, name="project"
        )
        x, state = self.block(project(both), positions, segment_ids, state, train)
        return norm(x, "final_norm"), state


class DeepseekV3(LanguageModel):
    """DeepSeek-V3; see `LanguageModel` for its calls.

    Attributes:
      width, depth: D and blocks, the modules that look ahead not counted.
      dense_depth: how many of the first blocks have a dense feed-forward.
      num_heads, q_rank, kv_rank, nope_dim, rope_dim, value_dim: see `LatentMixer`.
      mlp_width, expert_width: F of dense feed-forwards, and of an expert.
      num_experts, num_shared, top_k: routed experts, those that all tokens have, and
        how many of the routed ones a token has.
      groups, top_groups: a token's experts are in its best top_groups of the groups.
      routed_scale: factor on what the routed experts give.
      bias_rate: gamma, step of the bias that balances the experts.
      balance_coefficient: alpha, of the loss that balances experts within a sequence.
      num_ahead: modules, each of which predicts one token further.
      ahead_weight: lambda, of the modules' mean loss.
      vocab_size: tokens are 0 to vocab_size - 1.
      rope_base, rope_scaling, rope_layout: of the rotary positions.
      attention_scale, rope_magnitude: `scale` and `magnitude` of `LatentMixer`.
      tied: the table of embeddings is the output matrix too.
      context: the longest sequence it was made for.
      norm_eps: of all norms but those of latents.
      remat, scan: see `LanguageModel`.
      dtype: of the computation; parameters are float32.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    expert_width: int
    dense_depth: int = 3
    q_rank: int | None = 1536
    kv_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    num_experts: int = 256
    num_shared: int = 1
    top_k: int = 8
    groups: int = 8
    top_groups: int = 4
    routed_scale: float = 2.5
    bias_rate: float = 1e-3
    balance_coefficient: float = 1e-4
    num_ahead: int = 1
    ahead_weight: float = 0.3
    vocab_size: int = 129_280
    rope_base: float = 10_000.0
    rope_scaling: Scaling | None = None
    rope_layout: str = "interleaved"
    attention_scale: float | None = None
    rope_magnitude: float = 1.0
    tied: bool = False
    context: int | None = 4096
    norm_eps: float = 1e-6
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    def setup(self):
        """Makes the parts."""
        self.embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=_INIT)
        self.block = [
            self._block(mixer, dense=i < self.dense_depth) for i, mixer in enumerate(self.mixers())
        ]
        self.final_norm = make_norm("rms", self.norm_eps, self.dtype)
        self.head = (
            None
            if self.tied
            else Linear(self.vocab_size, use_bias=False, kernel_init=_INIT, dtype=self.dtype)
        )
        self.ahead = [
            MultiTokenModule(self._block(self._mixer(), dense=False), self.norm_eps, self.dtype)
            for _ in range(self.num_ahead)
        ]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Sequence[Any] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...] | None]:
        """As of `LanguageModel`."""
        hidden, state = super().hidden(tokens, positions, segment_ids, state, train)
        if self.is_initializing():
            for number in range(self.num_ahead):
                self.predict_ahead(hidden, tokens, number)
        return hidden, state

    def predict_ahead(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        number: int = 0,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One module: hidden states from which `logits` has the token one place further.

        As a draft: when `hidden` of tokens 1 to n has given token n + 1, module 0 takes
        it with tokens 2 to n + 1 and gives what token n + 2 is drafted from; module 1
        takes that with tokens 3 to n + 2, or module 0 is used again.

        Args:
          hidden: of the model, or of the module before.
          tokens: number + 1 places after those of the main model.
          number: of the module, from 0.
          positions, segment_ids: of the tokens of the main model, as for a mixer.
          state: of this module, one of `init_ahead_state`.
          train: passed on to the mixer.

        Returns:
          The hidden states, and the module's new state.

        Raises:
          ValueError: there is no such module; or as a mixer.

        Source: equations 21 to 23 of the paper.
        """
        if not 0 <= number < self.num_ahead:
            raise ValueError(
                f"DeepseekV3: predict_ahead has number={number} and the model num_ahead="
                f"{self.num_ahead} modules; they count from 0"
            )
        embedded = self.embed(tokens)
        return self.ahead[number](hidden, embedded, positions, segment_ids, state, train)

    def hidden_ahead(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        train: bool = False,
    ) -> list[Float[Array, "B _ D"]]:
        """Hidden states of the model and of each module, the k-th of (B, T - k, D).

        Raises:
          ValueError: the sequence is not longer than there are modules.
        """
        length = tokens.shape[1]
        if length <= self.num_ahead:
            raise ValueError(
                f"DeepseekV3: sequences of {length} tokens leave nothing to predict to "
                f"num_ahead={self.num_ahead} modules; make them longer"
            )
        found = [self.hidden(tokens, positions, segment_ids, None, train)[0]]
        for k in range(1, self.num_ahead + 1):
            first = slice(length - k)
            places = None if positions is None else positions[:, first]
            ids = None if segment_ids is None else _ids_ahead(segment_ids, k)
            before = found[-1][:, first]
            found.append(
                self.predict_ahead(before, tokens[:, k:], k - 1, places, ids, None, train)[0]
            )
        return found

    @nn.nowrap
    def init_ahead_state(self, batch: int, max_length: int, dtype: Dtype | None = None) -> tuple:
        """Empty states of the modules, one each; arguments as of `init_state`."""
        state = self._mixer().init_state(batch, max_length, dtype or self.dtype)
        return (state,) * self.num_ahead

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
        """As of `LanguageModel`, with the losses of the modules that look ahead.

        loss = L_0 + ahead_weight / num_ahead * sum_k L_k + what layers have sown

        L_k is the cross entropy of the token k + 1 places on, where that is a real target
        of the same document. Terms are "cross_entropy" for L_0, and for the modules
        "cross_entropy_2" ....

        Source: equations 24 and 25 of the paper.
        """
        self._require(batch)
        model_state = dict(model_state or {})
        hidden, sown, changed = self.in_training(
            {"params": params, **model_state},
            key,
            "hidden_ahead",
            batch["tokens"],
            batch.get("positions"),
            batch.get("segment_ids"),
        )
        kernel = self.output_kernel(params).astype(hidden[0].dtype)
        total, terms = 0.0, {}
        for k, found in enumerate(hidden):
            targets = (x[:, : found.shape[1]] for x in targets_ahead(batch, k))
            loss, of_k = chunked_cross_entropy(found, kernel, *targets, z_loss=z_loss)
            total += loss * (self.ahead_weight / self.num_ahead if k else 1.0)
            terms |= {f"{name}_{k + 1}" if k else name: value for name, value in of_k.items()}
        return total + sum(sown.values()), {**terms, **sown}, {**model_state, **changed}

    @nn.nowrap
    def mixers(self) -> list[nn.Module]:
        """Latent attention a layer, of no parent."""
        return [self._mixer() for _ in range(self.depth)]

    @nn.nowrap
    def _mixer(self) -> LatentMixer:
        return LatentMixer(
            num_heads=self.num_heads,
            q_rank=self.q_rank,
            kv_rank=self.kv_rank,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            position=Rotary(
                base=self.rope_base, layout=self.rope_layout, scaling=self.rope_scaling
            ),
            scale=self.attention_scale,
            magnitude=self.rope_magnitude,
            kernel_init=_INIT,
            dtype=self.dtype,
            parent=None,
        )

    @nn.nowrap
    def _block(self, mixer: nn.Module, dense: bool) -> DecoderBlock:
        if dense:
            mlp = GatedMlp(self.mlp_width, kernel_init=_INIT, dtype=self.dtype, parent=None)
        else:
            mlp = self._experts()
        return DecoderBlock(mixer, mlp, norm_eps=self.norm_eps, dtype=self.dtype, parent=None)

    @nn.nowrap
    def _experts(self) -> MixtureOfExperts:
        return MixtureOfExperts(
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_width=self.expert_width,
            scores="sigmoid",
            renormalise=True,
            groups=self.groups,
            top_groups=self.top_groups,
            scale=self.routed_scale,
            shared_width=self.num_shared * self.expert_width,
            balance_coefficient=self.balance_coefficient,
            bias_rate=self.bias_rate,
            kernel_init=_INIT,
            expert_init=_INIT,
            dtype=self.dtype,
            parent=None,
        )


def _ids_ahead(segment_ids: Int[Array, "B T"], ahead: int) -> Int[Array, "B _"]:
    """Documents of the first T - ahead places, below zero where experts count nothing.

    That is padding, and places whose token `ahead` further on is not of their document.
    """
    documents = document_index(segment_ids)
    here, there = documents[:, :-ahead], documents[:, ahead:]
    counted = (here == there) & (segment_ids[:, :-ahead] != 0)
    return jnp.where(counted, here + 1, -here - 1)


@register_model
def deepseek_v3(**overrides) -> DeepseekV3:
    """671 billion parameters, 37 of them for a token; for 163,840 tokens."""
    sizes = {
        "width": 7168,
        "depth": 61,
        "num_heads": 128,
        "mlp_width": 18_432,
        "expert_width": 2048,
        "rope_scaling": Yarn(factor=40.0, train_length=4096),
        "context": 163_840,
    }
    return DeepseekV3(**{**sizes, **overrides})
