"""Multi-scale retention, the mixing half of a RetNet block.

Paper    Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large
         Language Models", sections 2.1 and 2.2 (arXiv:2307.08621).
Differs  The three normalisations of retention scores of section 2.2 are left out:
         group norm takes any factor on a head away, so they change rounding alone.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.layers.mixers.inputs import token_positions
from jaxmodels.layers.mixers.recurrent import RecurrentMixer
from jaxmodels.ops.retention import retention as retain
from jaxmodels.ops.retention import retention_decays
from jaxmodels.ops.rotary import rotary_angles, rotary_frequencies, rotate
from jaxmodels.registry import register_mixer


class RetentionState(NamedTuple):
    """The memory (B, H, K, V) of every head, and how many tokens it has seen (B,)."""

    memory: Float[Array, "B H K V"]
    seen: Int[Array, "B"]


class MultiScaleRetention(RecurrentMixer):
    """Retention with rotated queries and keys and a decay a head.

    out = W_out (swish(W_gate x) * group_norm(concat_h retention(q_h, k_h, v_h, decay_h)))

    Attributes, beyond those of `RecurrentMixer`:
      value_expansion: width of a head's values over that of its keys.
      norm_eps: of the group norm, whose groups are the heads.
    """

    value_expansion: int = 2
    norm_eps: float = 1e-5

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions turn queries and keys."""
        value_dim = self.value_expansion * self.head_dim
        positions = token_positions(x, positions, segment_ids, state.seen)
        angles = rotary_angles(positions, rotary_frequencies(self.head_dim))
        q, k = (
            rotate(self.project_heads(name, x), angles, layout="interleaved") for name in ("q", "k")
        )
        mixed, memory = retain(
            q,
            k * self.head_dim**-0.5,
            self.project_heads("v", x, value_dim),
            retention_decays(self.num_heads),
            **self.recurrence_options(state.memory, segment_ids),
        )
        norm = nn.LayerNorm(
            epsilon=self.norm_eps, feature_axes=(-2, -1), dtype=self.dtype, name="norm"
        )
        gate = self.project("gate", x, self.num_heads * value_dim)
        mixed = nn.silu(gate) * norm(mixed).reshape(gate.shape)
        # Counted on from the last token, also where the caller counts himself.
        return self.project("out", mixed, x.shape[-1]), RetentionState(memory, positions[:, -1] + 1)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> RetentionState:
        """The state before the first token; of one size, whatever `max_length`."""
        memory = self.empty_memory(batch, self.value_expansion * self.head_dim)
        return RetentionState(memory, jnp.zeros(batch, jnp.int32))


@register_mixer
def retention(**overrides) -> MultiScaleRetention:
    """Multi-scale retention of RetNet (Sun et al. 2023)."""
    return MultiScaleRetention(**overrides)
