"""Lightning attention, the linear layer of MiniMax-Text-01.

Papers   Qin et al. 2024, "Lightning Attention-2" (arXiv:2401.04658), for the layer
         and its decay a head; MiniMax 2025, "MiniMax-01", section 2.2
         (arXiv:2501.08313), for its activations, norm and output gate.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.recurrent import RecurrentMixer
from jaxmodels.layers.normalization import RMSNorm
from jaxmodels.ops.checks import require_within
from jaxmodels.ops.retention import retention
from jaxmodels.registry import register_mixer


class LightningState(NamedTuple):
    """The memory (B, H, K, V) of every head."""

    memory: Float[Array, "B H K V"]


class LightningAttention(RecurrentMixer):
    """Linear attention whose heads fade at fixed rates, from fast to slow.

    q, k, v = silu(W x),   decay_h = exp(-2^(-8 h / H) (1 - depth)),   h = 1 ... H
    out = W_out (sigmoid(W_gate x) * rms_norm(concat_h retention(q_h, k_h, v_h, decay_h)))

    Attributes, beyond those of `RecurrentMixer`:
      depth_fraction: where in the network the layer stands, from 0 for the first
        to 1 for the last, which forgets almost nothing.
      norm_eps: of the norm over all heads together.
    """

    depth_fraction: float = 0.0
    norm_eps: float = 1e-6

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions play no part beyond their order."""
        q, k, v = (nn.silu(self.project_heads(name, x)) for name in "qkv")
        mixed, memory = retention(
            q, k, v, self._decays(), **self.recurrence_options(state.memory, segment_ids)
        )
        norm = RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
        mixed = norm(mixed.reshape(*x.shape[:2], -1))
        gate = nn.sigmoid(self.project("gate", x, mixed.shape[-1]))
        return self.project("out", gate * mixed, x.shape[-1]), LightningState(memory)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> LightningState:
        """The state before the first token; of one size, whatever `max_length`."""
        return LightningState(self.empty_memory(batch))

    def _decays(self) -> Float[Array, "H"]:
        require_within(type(self).__name__, "depth_fraction", self.depth_fraction, 0.0, 1.0)
        heads = jnp.arange(1, self.num_heads + 1, dtype=jnp.float32)
        # The 1e-5 is of the published model: the last layer forgets a little.
        depth = 1.0 - self.depth_fraction + 1e-5
        return jnp.exp(-(2.0 ** (-8.0 * heads / self.num_heads)) * depth)


@register_mixer
def lightning(**overrides) -> LightningAttention:
    """Lightning attention of MiniMax-01 (Qin et al. 2024)."""
    return LightningAttention(**overrides)
