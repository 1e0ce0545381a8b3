"""The gated attention unit: attention and feed-forward in one, with a single head.

Paper    Hua et al. 2022, "Transformer Quality in Linear Time", section 2.2, figure 2
         and its pseudocode (arXiv:2202.10447).
Differs  The norm before the unit and the residual around it belong to the block. The
         bias on the logits has its rotary form at every length, where the paper
         learns a table up to 512 tokens. Each scale starts at s^(-1/4), so that q . k
         starts like z . z / sqrt(s). See `ops.gated_attention` for the divisor n.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mixers.cache import KVCache, empty_cache, extend, tokens_seen
from jaxmodels.layers.mixers.inputs import (
    check_call,
    check_state,
    require_no_state_if_bidirectional,
    token_positions,
)
from jaxmodels.ops.gated_attention import gated_attention
from jaxmodels.ops.rotary import rotary_angles, rotary_frequencies, rotate
from jaxmodels.registry import register_mixer


class GatedInputs(nn.Module):
    """Gate, values, and any number of queries and keys from one shared projection.

    [u, v, z] = silu(x W + b);  q_i = rotate(scale_i * z + offset_i)

    Attributes:
      count: how many queries and keys.
      head_dim: s, the width of z and of each of them; even.
      value_dim: e, the width of u and v.
      dtype: of the computation; parameters are float32.
    """

    count: int
    head_dim: int
    value_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"], list[Float[Array, "B T K"]]]:
        """Returns the gate u, the values v, and the queries and keys."""
        s, e = self.head_dim, self.value_dim
        mixed = nn.silu(Linear(2 * e + s, dtype=self.dtype, name="in")(x))
        u, v, z = jnp.split(mixed, (e, 2 * e), axis=-1)
        scale = self.param("scale", nn.initializers.constant(s**-0.25), (self.count, s))
        offset = self.param("offset", nn.initializers.zeros, (self.count, s))
        scale, offset = (y.astype(z.dtype)[None, None] for y in (scale, offset))
        turned = rotate(z[:, :, None] * scale + offset, _angles(positions, s))
        return u, v, [turned[:, :, i] for i in range(self.count)]


class RotaryBias(nn.Module):
    """Factors of a bias that depends on the distance of query and key alone.

    bias_ts = rotate(a, t) . rotate(b, s)

    Attributes:
      width: of a and b; even.

    Source: Hua et al. 2022, `rel_pos_bias` of its pseudocode (arXiv:2202.10447).
    """

    width: int

    @nn.compact
    def __call__(
        self, q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B T R"], Float[Array, "B S R"]]:
        """Returns the factors of queries and of keys, in float32."""
        return self._turned("a", q_positions), self._turned("b", k_positions)

    def _turned(self, name, positions):
        vector = self.param(name, nn.initializers.normal(0.02), (self.width,))
        vector = jnp.broadcast_to(vector, (*positions.shape, 1, self.width))
        return rotate(vector, _angles(positions, self.width))[:, :, 0]


def _angles(positions, width):
    return rotary_angles(positions, rotary_frequencies(width))


class GatedAttentionUnit(nn.Module):
    """Gated attention unit with quadratic attention.

    out = W_out (u * attention(q, k, v)), with u, v, q and k of `GatedInputs`

    Attributes:
      head_dim: s, width of queries and keys.
      value_dim: e, width of values and gate. The paper takes twice the model's
        width, and so does None; but then there is no `init_state`.
      kernel: "relu2" or "softmax", see `ops.gated_attention`.
      causal: hides tokens that follow.
      dtype: of the computation; parameters are float32.
    """

    head_dim: int = 128
    value_dim: int | None = 512
    kernel: str = "relu2"
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: KVCache | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Mixes the sequence; see `jaxmodels.layers.mixers` for the signature.

        Raises:
          ValueError: shapes disagree, a state without room or of another batch, or a
            state without causality.
        """
        name = type(self).__name__
        check_call(name, x, positions, segment_ids)
        require_no_state_if_bidirectional(name, self.causal, state)
        seen = None
        if state is not None:
            room = state.k.shape[1] if isinstance(state, KVCache) else 0
            check_state(name, state, jax.eval_shape(lambda: self.init_state(len(x), room, x.dtype)))
            seen = tokens_seen(state)
        places = token_positions(x, positions, segment_ids, seen)
        value_dim = self.value_dim or 2 * x.shape[-1]
        inputs = GatedInputs(2, self.head_dim, value_dim, self.dtype, name="inputs")
        u, v, (q, k) = inputs(x, places)
        bias = RotaryBias(self.head_dim, name="bias")
        if state is None:
            options = {"causal": self.causal, "segment_ids": segment_ids}
            key_places = places
        else:
            state, held = extend(
                state, k[:, :, None], v[:, :, None], places, segment_ids, name=name
            )
            k, v = (y[:, :, 0].astype(q.dtype) for y in (held.k, held.v))
            options = {"mask": held.mask[:, 0]}
            key_places = held.positions
        out = gated_attention(q, k, v, kernel=self.kernel, bias=bias(places, key_places), **options)
        return Linear(x.shape[-1], dtype=self.dtype, name="out")(u * out), state

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> KVCache:
        """A cache for `max_length` tokens.

        Raises:
          ValueError: value_dim is None, so that the width of a value is not known.
        """
        if self.value_dim is None:
            raise ValueError(f"{type(self).__name__}: init_state needs value_dim; set the field")
        return empty_cache(batch, max_length, 1, (self.head_dim, self.value_dim), dtype)


@register_mixer
def gau(**overrides) -> GatedAttentionUnit:
    """The gated attention unit with softmax attention, the paper's ablation."""
    return GatedAttentionUnit(**{"kernel": "softmax", **overrides})


@register_mixer
def flash_quad(**overrides) -> GatedAttentionUnit:
    """FLASH-Quad: the gated attention unit with squared ReLU attention."""
    return GatedAttentionUnit(**overrides)
