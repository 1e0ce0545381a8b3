"""Gated DeltaNet: linear attention that corrects its memory and forgets.

Paper    Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta
         Rule", section 3.4 and figure 1 (arXiv:2412.06464); agrees with
         `qwen3_next` of `transformers`, including heads of values that share
         queries and keys.
Differs  a fresh layer's decays are those of the paper's code; `qwen3_next` starts
         from a bias of 1, which forgets within a few tokens.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.decays import decay_rates, step_biases
from jaxmodels.layers.mixers.delta_mixer import DeltaMixer, DeltaState
from jaxmodels.ops.delta_rule import gated_delta_rule
from jaxmodels.registry import register_mixer


class GatedDeltaNet(DeltaMixer):
    """The delta rule with a data-dependent decay and write strength a head.

    q, k, v = silu(conv(W x)),   beta = sigmoid(W_beta x)
    log_decay = -exp(A_log) softplus(W_decay x + b)
    mixed = gated_delta_rule(q / |q| / sqrt(K), k / |k|, v, log_decay, beta)
    out = W_out (rms_norm_h(mixed_h) * silu(W_gate x)_h)

    Attributes, beyond those of `DeltaMixer`:
      num_value_heads: N, a multiple of num_heads; N / num_heads consecutive heads
        of values share one of queries and keys. None is num_heads.
      value_dim: width of a head of values; None is head_dim.
    """

    num_value_heads: int | None = None
    value_dim: int | None = None

    def value_shape(self) -> tuple[int, int]:
        """Heads and width of the values."""
        return self.num_value_heads or self.num_heads, self.value_dim or self.head_dim

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions play no part beyond their order."""
        heads, width = self.value_shape()
        if heads % self.num_heads:
            raise ValueError(
                f"GatedDeltaNet: num_value_heads={heads} is no multiple of "
                f"num_heads={self.num_heads}; choose a multiple"
            )
        q, k, v, convolved = self.convolve(x, segment_ids, state)
        q, k = (jnp.repeat(y, heads // self.num_heads, axis=2) for y in (q, k))
        mixed, memory = gated_delta_rule(
            q * self.head_dim**-0.5,
            k,
            v,
            self._log_decay(x, heads),
            self.strength(x),
            **self.recurrence_options(state.memory, segment_ids),
        )
        gate = nn.silu(self.project("gate", x, heads * width).astype(jnp.float32))
        return self.finish(mixed, gate, x.shape[-1]), DeltaState(memory, convolved)

    def _log_decay(self, x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T H"]:
        a_log = self.param("A_log", decay_rates(0.01, 16.0), (heads,))
        bias = self.param("dt_bias", step_biases(), (heads,))
        step = nn.softplus(self.project("decay", x, heads).astype(jnp.float32) + bias[None, None])
        return -jnp.exp(a_log)[None, None] * step


@register_mixer
def gated_delta(**overrides) -> GatedDeltaNet:
    """Gated DeltaNet (Yang et al. 2024), the linear layer of Qwen3-Next."""
    return GatedDeltaNet(**overrides)
