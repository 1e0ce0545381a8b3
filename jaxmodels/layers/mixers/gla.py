"""Gated linear attention, the mixing half of a GLA block.

Paper    Yang et al. 2023, "Gated Linear Attention Transformers with
         Hardware-Efficient Training", sections 4.1 and 4.4 (arXiv:2312.06635).
"""

from typing import NamedTuple

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.recurrent import RecurrentMixer
from jaxmodels.ops.gated_linear_attention import gated_linear_attention
from jaxmodels.registry import register_mixer


class GatedLinearState(NamedTuple):
    """The memory (B, H, K, V) of every head."""

    memory: Float[Array, "B H K V"]


class GatedLinearAttention(RecurrentMixer):
    """Linear attention whose memory fades by a data-dependent factor a channel.

    decay = sigmoid(W_up W_down x + b)^(1 / temperature)
    out = W_out (swish(W_gate x + b) * layer_norm_h(gla(q_h, k_h, v_h, decay_h)))

    Attributes, beyond those of `RecurrentMixer`:
      value_expansion: width of a head's values over that of its keys.
      gate_rank: width between the two maps to the decays.
      gate_temperature: the higher, the slower a fresh layer forgets.
      norm_eps: of the norm of each head.
    """

    chunk_size: int = 32
    value_expansion: int = 2
    gate_rank: int = 16
    gate_temperature: float = 16.0
    norm_eps: float = 1e-5

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions play no part beyond their order."""
        value_dim = self.value_expansion * self.head_dim
        q, k = self.project_heads("q", x), self.project_heads("k", x)
        low = self.project("decay_down", x, self.gate_rank)
        decay = self.project("decay_up", low, self.num_heads * self.head_dim, use_bias=True)
        mixed, memory = gated_linear_attention(
            q * self.head_dim**-0.5,
            k,
            self.project_heads("v", x, value_dim),
            nn.log_sigmoid(decay.astype("float32")).reshape(k.shape) / self.gate_temperature,
            **self.recurrence_options(state.memory, segment_ids),
        )
        norm = nn.LayerNorm(
            epsilon=self.norm_eps, feature_axes=(-2, -1), dtype=self.dtype, name="norm"
        )
        gate = self.project("gate", x, self.num_heads * value_dim, use_bias=True)
        mixed = nn.silu(gate) * norm(mixed).reshape(gate.shape)
        return self.project("out", mixed, x.shape[-1]), GatedLinearState(memory)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> GatedLinearState:
        """The state before the first token; of one size, whatever `max_length`."""
        memory = self.empty_memory(batch, self.value_expansion * self.head_dim)
        return GatedLinearState(memory)


@register_mixer
def gla(**overrides) -> GatedLinearAttention:
    """Gated linear attention (Yang et al. 2023)."""
    return GatedLinearAttention(**overrides)
