"""HGRN2, a gated linear recurrence with an expanded state.

Paper    Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion",
         section 3 (arXiv:2404.07904).
Differs  The paper learns the lower bounds of all layers together, as a cumulative
         softmax over depth; here a layer's bound is a field.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.recurrent import RecurrentMixer
from jaxmodels.layers.normalization import RMSNorm
from jaxmodels.ops.checks import require_within
from jaxmodels.ops.gated_linear_attention import gated_linear_attention
from jaxmodels.registry import register_mixer


class Hgrn2State(NamedTuple):
    """The memory (B, H, K, V) of every head."""

    memory: Float[Array, "B H K V"]


class Hgrn2(RecurrentMixer):
    """A recurrence that writes as much as it forgets: the keys are one minus the decay.

    f = lower_bound + (1 - lower_bound) sigmoid(W_forget x)
    S_t = diag(f_t) S_(t-1) + (1 - f_t) i_t^T,   i = W_input x
    out = W_out rms_norm(concat_h S_t^T o_t),     o = swish(W_output x)

    The output gate o reads the state as a query does. The state of an ordinary
    gated recurrence is expanded from V to K x V per head without more parameters.

    Attributes, beyond those of `RecurrentMixer`:
      lower_bound: of the forget gate, in [0, 1). The paper's grows with depth, so
        that lower layers see near and upper ones far.
      norm_eps: of the norm over all heads together.
    """

    chunk_size: int = 32
    lower_bound: float = 0.0
    norm_eps: float = 1e-5

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions play no part beyond their order."""
        require_within(type(self).__name__, "lower_bound", self.lower_bound, 0.0, 1.0 - 1e-6)
        forget = self.project_heads("forget", x).astype(jnp.float32)
        bound = jnp.log(jnp.float32(self.lower_bound))
        rest = jnp.log1p(-jnp.float32(self.lower_bound))
        mixed, memory = gated_linear_attention(
            nn.silu(self.project_heads("output", x)),
            jnp.exp(rest + nn.log_sigmoid(-forget)),
            self.project_heads("input", x),
            jnp.minimum(jnp.logaddexp(bound, rest + nn.log_sigmoid(forget)), 0.0),
            **self.recurrence_options(state.memory, segment_ids),
        )
        norm = RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
        mixed = norm(mixed.reshape(*x.shape[:2], -1))
        return self.project("out", mixed, x.shape[-1]), Hgrn2State(memory)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> Hgrn2State:
        """The state before the first token; of one size, whatever `max_length`."""
        return Hgrn2State(self.empty_memory(batch))


@register_mixer
def hgrn2(**overrides) -> Hgrn2:
    """HGRN2 (Qin et al. 2024)."""
    return Hgrn2(**overrides)
