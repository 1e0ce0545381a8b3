"""GPT-2: learned positions, layer norm before each half, one table for input and output.

Paper    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
         section 2.3; the block of Radford et al. 2018.
Differs  no dropout: models of today see each token about once.
Weights  `transformers` folders of model type "gpt2", both ways.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from jaxmodels.layers.mixers.cache import KVCache, tokens_seen
from jaxmodels.layers.mixers.inputs import token_positions
from jaxmodels.layers.mixers.softmax import SoftmaxMixer
from jaxmodels.layers.mlp import Mlp
from jaxmodels.layers.position_embeddings import LearnedPositions
from jaxmodels.layers.positions import NoPositions
from jaxmodels.models.language.language_model import DecoderBlock, LanguageModel, make_norm
from jaxmodels.registry import register_model

_INIT = nn.initializers.normal(0.02)


class GPT2(LanguageModel):
    """GPT-2; see `LanguageModel` for its calls.

    Attributes:
      width, depth, num_heads: D, blocks, and heads of width D / num_heads.
      mlp_width: F; None is 4 D.
      vocab_size: tokens are 0 to vocab_size - 1.
      context: how many positions were learned.
      norm_eps: of the layer norms.
      remat, scan: see `LanguageModel`.
      dtype: of the computation; parameters are float32.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int | None = None
    vocab_size: int = 50_257
    context: int = 1024
    norm_eps: float = 1e-5
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    def setup(self):
        """Makes the parts."""
        self.embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=_INIT)
        self.place = LearnedPositions(self.context, self.width, dtype=self.dtype)
        self.block = [
            DecoderBlock(
                mixer,
                Mlp(self.mlp_width or 4 * self.width, kernel_init=_INIT, dtype=self.dtype),
                norm="layer",
                norm_eps=self.norm_eps,
                dtype=self.dtype,
            )
            for mixer in self.mixers()
        ]
        self.final_norm = make_norm("layer", self.norm_eps, self.dtype)
        self.head = None

    def embedded(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        state: Sequence[KVCache] | None,
    ) -> Float[Array, "B T D"]:
        """Vectors of the tokens and of their positions; NaN beyond the context."""
        x = self.embed(tokens)
        seen = None if state is None else tokens_seen(state[0])
        return x + self.place(token_positions(x, positions, segment_ids, seen))

    @nn.nowrap
    def mixers(self) -> list[nn.Module]:
        """Softmax attention a layer, of no parent."""
        fields: dict[str, Any] = {
            "num_heads": self.num_heads,
            "head_dim": self.width // self.num_heads,
            "use_bias": True,
            "position": NoPositions(),
            "dtype": self.dtype,
            # Each block adds twice to the stream, whose variance is thus kept.
            "kernel_init": _INIT,
            "out_init": nn.initializers.normal(0.02 * (2 * self.depth) ** -0.5),
        }
        return [SoftmaxMixer(**fields, parent=None) for _ in range(self.depth)]


@register_model
def gpt2_small(**overrides) -> GPT2:
    """124 million parameters."""
    return GPT2(**{"width": 768, "depth": 12, "num_heads": 12, **overrides})


@register_model
def gpt2_medium(**overrides) -> GPT2:
    """355 million parameters."""
    return GPT2(**{"width": 1024, "depth": 24, "num_heads": 16, **overrides})


@register_model
def gpt2_large(**overrides) -> GPT2:
    """774 million parameters."""
    return GPT2(**{"width": 1280, "depth": 36, "num_heads": 20, **overrides})


@register_model
def gpt2_xl(**overrides) -> GPT2:
    """1.56 billion parameters."""
    return GPT2(**{"width": 1600, "depth": 48, "num_heads": 25, **overrides})
