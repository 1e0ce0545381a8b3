"""Llama 3: grouped query heads, rotary positions, RMSNorm and SwiGLU.

Paper    Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.2
         (arXiv:2407.21783), on Touvron et al. 2023, "LLaMA", section 2.2
         (arXiv:2302.13971).
Weights  `transformers` folders of model type "llama", both ways.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype

from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mixers.softmax import SoftmaxMixer
from jaxmodels.layers.mlp import GatedMlp
from jaxmodels.layers.positions import Rotary
from jaxmodels.layers.rotary_scaling import Llama3, Scaling
from jaxmodels.models.language.language_model import DecoderBlock, LanguageModel, make_norm
from jaxmodels.registry import register_model

_INIT = nn.initializers.normal(0.02)


class Llama(LanguageModel):
    """Llama; see `LanguageModel` for its calls.

    Attributes:
      width, depth: D and blocks.
      num_heads, num_kv_heads: of queries, and of keys and values.
      head_dim: of all of them; None is width / num_heads.
      mlp_width: F.
      vocab_size: tokens are 0 to vocab_size - 1.
      rope_base, rope_scaling: of the rotary positions.
      qk_norm: normalises queries and keys a head, which Llama does not; "rms" as in Qwen3.
      window: how many earlier tokens are seen; None is all, as in Llama.
      tied: the table of embeddings is the output matrix too.
      context: the longest sequence it was made for.
      norm_eps: of all norms.
      remat, scan: see `LanguageModel`.
      dtype: of the computation; parameters are float32.
    """

    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    head_dim: int | None = None
    vocab_size: int = 128_256
    rope_base: float = 500_000.0
    rope_scaling: Scaling | None = None
    qk_norm: str | None = None
    window: int | None = None
    tied: bool = False
    context: int | None = 8192
    norm_eps: float = 1e-5
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    def setup(self):
        """Makes the parts."""
        self.embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=_INIT)
        self.block = [
            DecoderBlock(mixer, self.feed_forward(), norm_eps=self.norm_eps, dtype=self.dtype)
            for mixer in self.mixers()
        ]
        self.final_norm = make_norm("rms", self.norm_eps, self.dtype)
        self.head = (
            None
            if self.tied
            else Linear(self.vocab_size, use_bias=False, kernel_init=_INIT, dtype=self.dtype)
        )

    @nn.nowrap
    def feed_forward(self) -> nn.Module:
        """That of one block, of no parent."""
        return GatedMlp(self.mlp_width, kernel_init=_INIT, dtype=self.dtype, parent=None)

    @nn.nowrap
    def mixers(self) -> list[nn.Module]:
        """Softmax attention a layer, of no parent."""
        fields: dict[str, Any] = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim or self.width // self.num_heads,
            "position": Rotary(base=self.rope_base, scaling=self.rope_scaling),
            "qk_norm": self.qk_norm,
            "norm_eps": self.norm_eps,
            "window": self.window,
            "dtype": self.dtype,
            "kernel_init": _INIT,
            "out_init": _INIT,
        }
        return [SoftmaxMixer(**fields, parent=None) for _ in range(self.depth)]


_8B = {"width": 4096, "depth": 32, "num_heads": 32, "num_kv_heads": 8, "mlp_width": 14_336}
_70B = {"width": 8192, "depth": 80, "num_heads": 64, "num_kv_heads": 8, "mlp_width": 28_672}
_LONG = {"rope_scaling": Llama3(factor=8.0, train_length=8192), "context": 131_072}
_SMALL = {
    "rope_scaling": Llama3(factor=32.0, train_length=8192),
    "context": 131_072,
    "num_heads": 32,
    "num_kv_heads": 8,
    "mlp_width": 8192,
    "tied": True,
}


@register_model
def llama3_8b(**overrides) -> Llama:
    """Llama 3, 8 billion parameters."""
    return Llama(**{**_8B, **overrides})


@register_model
def llama3_70b(**overrides) -> Llama:
    """Llama 3, 70 billion parameters."""
    return Llama(**{**_70B, **overrides})


@register_model
def llama3_1_8b(**overrides) -> Llama:
    """Llama 3.1, 8 billion parameters, for 131,072 tokens."""
    return Llama(**{**_8B, **_LONG, **overrides})


@register_model
def llama3_1_70b(**overrides) -> Llama:
    """Llama 3.1, 70 billion parameters, for 131,072 tokens."""
    return Llama(**{**_70B, **_LONG, **overrides})


@register_model
def llama3_2_1b(**overrides) -> Llama:
    """Llama 3.2, 1.2 billion parameters."""
    return Llama(**{"width": 2048, "depth": 16, **_SMALL, **overrides})


@register_model
def llama3_2_3b(**overrides) -> Llama:
    """Llama 3.2, 3.2 billion parameters."""
    sizes = {"width": 3072, "depth": 28, **_SMALL, "num_heads": 24, "head_dim": 128}
    return Llama(**{**sizes, **overrides})
