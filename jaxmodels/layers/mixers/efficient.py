"""Efficient attention: a softmax over features, a softmax over time.

Paper    Shen et al. 2018, "Efficient Attention: Attention with Linear
         Complexities", section 3.2 (arXiv:1812.01243).
Differs  The paper's layer is bidirectional; causally, the softmax over time runs
         over the tokens so far.
"""

from jax.typing import DTypeLike

from jaxmodels.layers.mixers.projected import ProjectedMixer
from jaxmodels.ops.efficient_attention import (
    EfficientState,
    efficient_attention,
    empty_efficient_state,
)
from jaxmodels.registry import register_mixer


class EfficientAttention(ProjectedMixer):
    """Multi-head efficient attention; attributes as of `ProjectedMixer`."""

    def mix(self, q, k, v, positions, segment_ids, state):
        """See `ProjectedMixer`; positions play no part beyond their order."""
        return efficient_attention(
            q,
            k,
            v,
            causal=self.causal,
            initial_state=state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> EfficientState:
        """The state before the first token, float32 and of one size whatever the length."""
        return empty_efficient_state(
            batch, self.num_heads, key_width=self.head_dim, width=self.head_dim
        )


@register_mixer
def efficient(**overrides) -> EfficientAttention:
    """Efficient attention with two softmaxes (Shen et al. 2018)."""
    return EfficientAttention(**overrides)
