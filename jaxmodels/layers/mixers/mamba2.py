"""Mamba-2: a selective state-space layer, computed as gated linear attention.

Paper    Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient
         Algorithms Through Structured State Space Duality", sections 5 to 7 and
         figure 6 (arXiv:2405.21060); agrees with `mamba2` of `transformers`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.decays import decay_rates, step_biases
from jaxmodels.layers.mixers.recurrent import RecurrentMixer
from jaxmodels.layers.short_convolution import ShortConvolution
from jaxmodels.ops.gated_linear_attention import scalar_gated_linear_attention
from jaxmodels.registry import register_mixer


class Mamba2State(NamedTuple):
    """The memory (B, H, N, V) of every head and the last inputs of the convolution."""

    memory: Float[Array, "B H N V"]
    convolved: Float[Array, "B P D"]


class Mamba2(RecurrentMixer):
    """A state-space model with a scalar, data-dependent decay a head.

    z, x', B', C', dt' = W_in x,   x, B, C = silu(conv(x', B', C')),   dt = softplus(dt' + b)
    S_t = exp(-exp(A_log) dt_t) S_(t-1) + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D x_t
    out = W_out rms_norm_g(y * silu(z))

    Attributes, beyond those of `RecurrentMixer`, whose `head_dim` is here the width
    of x in a head; the paper has num_heads * head_dim = 2 * model width:
      state_dim: N, the width of B and C.
      num_groups: of B and C, each shared by the heads of a group, and of the norm.
      conv_size: steps that the convolution sees.
      use_bias: gives both projections a bias.
      norm_eps: of the norm of each group.
    """

    state_dim: int = 64
    num_groups: int = 1
    conv_size: int = 4
    use_bias: bool = False
    norm_eps: float = 1e-5

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions play no part beyond their order."""
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"Mamba2: num_groups={self.num_groups} does not divide "
                f"num_heads={self.num_heads}; choose a divisor"
            )
        inner = self.num_heads * self.head_dim
        projected = self.project(
            "in", x, inner + self._conv_width() + self.num_heads, self.use_bias
        )
        z, convolved, dt = jnp.split(projected, [inner, inner + self._conv_width()], axis=-1)
        convolved, conv_state = ShortConvolution(
            self.conv_size, use_bias=True, dtype=self.dtype, name="conv"
        )(convolved, state=state.convolved, segment_ids=segment_ids)
        y, memory = self._mix_heads(convolved, dt, segment_ids, state.memory)
        out = self._norm(y.reshape(z.shape), z)
        out = self.project("out", out, x.shape[-1], self.use_bias)
        return out, Mamba2State(memory, conv_state)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> Mamba2State:
        """The state before the first token; of one size, whatever `max_length`."""
        return Mamba2State(
            jnp.zeros((batch, self.num_heads, self.state_dim, self.head_dim)),
            jnp.zeros((batch, self.conv_size - 1, self._conv_width()), dtype),
        )

    def _conv_width(self) -> int:
        return self.num_heads * self.head_dim + 2 * self.num_groups * self.state_dim

    def _mix_heads(self, convolved, dt, segment_ids, memory):
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_dim
        x, b, c = jnp.split(convolved, [inner, inner + shared], axis=-1)
        x = x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        b, c = (
            jnp.repeat(
                y.reshape(*y.shape[:2], self.num_groups, self.state_dim),
                self.num_heads // self.num_groups,
                axis=2,
            )
            for y in (b, c)
        )
        per_head = (self.num_heads,)
        dt_bias = self.param("dt_bias", step_biases(), per_head)
        a_log = self.param("A_log", decay_rates(1.0, 16.0), per_head)
        skip = self.param("D", nn.initializers.ones, per_head)
        dt = nn.softplus(dt.astype(jnp.float32) + dt_bias[None, None])
        y, memory = scalar_gated_linear_attention(
            c,
            b,
            x * dt[..., None],
            -jnp.exp(a_log)[None, None] * dt,
            **self.recurrence_options(memory, segment_ids),
        )
        return y + skip[None, None, :, None] * x, memory

    def _norm(self, y: Float[Array, "B T F"], z: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        y = y * nn.silu(z.astype(jnp.float32))
        groups = y.reshape(*y.shape[:2], self.num_groups, -1)
        norm = nn.RMSNorm(
            epsilon=self.norm_eps, feature_axes=(-2, -1), dtype=self.dtype, name="norm"
        )
        return norm(groups).reshape(y.shape)


@register_mixer
def ssd(**overrides) -> Mamba2:
    """The state-space layer of Mamba-2 (Dao and Gu 2024)."""
    return Mamba2(**overrides)
