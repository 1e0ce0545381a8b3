"""The Performer's attention: softmax attention by random features.

Paper    Choromanski et al. 2021, "Rethinking Attention with Performers", sections
         2.2 to 2.4 (arXiv:2009.14794).
Differs  Nothing is hidden in the module: the projection follows from the field
         `projection_seed`, and to redraw it, as the paper does every thousand
         steps, is to apply a mixer with another seed to the same parameters.
"""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.projected import ProjectedMixer
from jaxmodels.ops.feature_maps import gaussian_projection, orthogonal_projection
from jaxmodels.ops.performer import PerformerState, empty_performer_state, performer_attention
from jaxmodels.registry import register_mixer


class PerformerAttention(ProjectedMixer):
    """Multi-head attention by FAVOR+.

    Attributes, beyond those of `ProjectedMixer`:
      num_features: M, how many random directions all heads share.
      orthogonal: draws them orthogonal to each other, else independently.
      projection_seed: of the draw. A state belongs to the seed it was made with.
      kernel: "positive" or "trigonometric", see `ops.performer_attention`.
    """

    num_features: int = 256
    orthogonal: bool = True
    projection_seed: int = 0
    kernel: str = "positive"

    def mix(self, q, k, v, positions, segment_ids, state):
        """See `ProjectedMixer`; positions play no part beyond their order."""
        return performer_attention(
            q,
            k,
            v,
            self._projection(),
            kernel=self.kernel,
            causal=self.causal,
            initial_state=state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> PerformerState:
        """The state before the first token, float32 and of one size whatever the length."""
        features = self.num_features * (2 if self.kernel == "trigonometric" else 1)
        return empty_performer_state(batch, self.num_heads, features=features, width=self.head_dim)

    def _projection(self) -> Float[Array, "M K"]:
        draw = orthogonal_projection if self.orthogonal else gaussian_projection
        # It depends on fields alone: drawn while tracing, a constant afterwards.
        with jax.ensure_compile_time_eval():
            return draw(jax.random.key(self.projection_seed), self.num_features, self.head_dim)


@register_mixer
def performer(**overrides) -> PerformerAttention:
    """Performer attention with orthogonal positive features (Choromanski et al. 2021)."""
    return PerformerAttention(**overrides)
