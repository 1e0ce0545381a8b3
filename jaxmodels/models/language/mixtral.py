"""Mixtral: Llama's decoder with a mixture of experts in place of each feed-forward.

Paper    Jiang et al. 2024, "Mixtral of Experts", section 2 (arXiv:2401.04088).
Differs  the balance loss is the mean of one a layer; `transformers` takes one over
         all layers together.
Weights  `transformers` folders of model type "mixtral", both ways.
"""

import flax.linen as nn

from jaxmodels.layers.experts import MixtureOfExperts
from jaxmodels.models.language.llama import Llama
from jaxmodels.registry import register_model

_INIT = nn.initializers.normal(0.02)


class Mixtral(Llama):
    """Mixtral; see `Llama` for the other attributes and `LanguageModel` for its calls.

    Attributes:
      mlp_width: F, of each expert.
      num_experts, top_k: of each layer, and how many of them a token sees.
      capacity_factor: None drops no token; see `MixtureOfExperts`.
      balance_coefficient: of the balance loss, a mean over layers.
      z_coefficient: of the router's z-loss, a mean over layers.
    """

    vocab_size: int = 32_000
    rope_base: float = 1_000_000.0
    context: int | None = 32_768
    num_experts: int = 8
    top_k: int = 2
    capacity_factor: float | None = None
    balance_coefficient: float = 0.02
    z_coefficient: float = 0.0

    @nn.nowrap
    def feed_forward(self) -> nn.Module:
        """The experts of one block, of no parent."""
        return MixtureOfExperts(
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_width=self.mlp_width,
            capacity_factor=self.capacity_factor,
            # What layers sow is summed.
            balance_coefficient=self.balance_coefficient / self.depth,
            z_coefficient=self.z_coefficient / self.depth,
            kernel_init=_INIT,
            expert_init=_INIT,
            dtype=self.dtype,
            parent=None,
        )


@register_model
def mixtral_8x7b(**overrides) -> Mixtral:
    """46.7 billion parameters, 12.9 of them for a token; for 32,768 tokens."""
    sizes = {"width": 4096, "depth": 32, "num_heads": 32, "num_kv_heads": 8, "mlp_width": 14_336}
    return Mixtral(**{**sizes, **overrides})


@register_model
def mixtral_8x22b(**overrides) -> Mixtral:
    """141 billion parameters, 39 of them for a token; for 65,536 tokens."""
    sizes = {"width": 6144, "depth": 56, "num_heads": 48, "num_kv_heads": 8, "mlp_width": 16_384}
    rest = {"context": 65_536, "balance_coefficient": 0.001}
    return Mixtral(**{**sizes, **rest, **overrides})
