"""Kimi Delta Attention: a corrected memory of which every channel fades by itself.

Paper    Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention
         Architecture", sections 3 and 4 (arXiv:2510.26692); agrees with
         `kimi_linear` of `transformers`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.decays import decay_rates, step_biases
from jaxmodels.layers.mixers.delta_mixer import DeltaMixer, DeltaState
from jaxmodels.ops.kimi_delta import kimi_delta_rule
from jaxmodels.registry import register_mixer


class KimiDeltaAttention(DeltaMixer):
    """The delta rule with a data-dependent decay a channel.

    q, k, v = silu(conv(W x)),   beta = sigmoid(W_beta x)
    log_decay_h = -exp(A_log_h) softplus(W_up W_down x + b)_h
    mixed = kimi_delta_rule(q / |q| / sqrt(K), k / |k|, v, log_decay, beta)
    out = W_out (rms_norm_h(mixed_h) * sigmoid(V_up V_down x)_h)

    Both W_down and V_down map to head_dim.

    Attributes: those of `DeltaMixer`.
    """

    norm_eps: float = 1e-5

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions play no part beyond their order."""
        q, k, v, convolved = self.convolve(x, segment_ids, state)
        mixed, memory = kimi_delta_rule(
            q * self.head_dim**-0.5,
            k,
            v,
            self._log_decay(x),
            self.strength(x),
            **self.recurrence_options(state.memory, segment_ids),
        )
        gate = nn.sigmoid(self._low_rank("gate", x))
        return self.finish(mixed, gate, x.shape[-1]), DeltaState(memory, convolved)

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        a_log = self.param("A_log", decay_rates(1.0, 16.0), (self.num_heads,))
        bias = self.param("dt_bias", step_biases(), (self.num_heads * self.head_dim,))
        step = nn.softplus(self._low_rank("decay", x) + bias[None, None])
        step = step.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        return -jnp.exp(a_log)[None, None, :, None] * step

    def _low_rank(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        low = self.project(f"{name}_down", x, self.head_dim)
        up = self.project(f"{name}_up", low, self.num_heads * self.head_dim)
        return up.astype(jnp.float32)


@register_mixer
def kda(**overrides) -> KimiDeltaAttention:
    """Kimi Delta Attention (Kimi Team 2025), the linear layer of Kimi Linear."""
    return KimiDeltaAttention(**overrides)
