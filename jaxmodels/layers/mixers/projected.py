"""What the layers of the linear attentions share: a projection in front, one behind."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mixers.inputs import (
    check_call,
    check_state,
    require_no_state_if_bidirectional,
)


class ProjectedMixer(nn.Module):
    """Multi-head attention around any way to mix q, k and v.

    out = W_out concat_h(mix(W_q x, W_k x, W_v x)_h)

    A mixer of this kind has two methods more, and may widen `key_width`:

    mix(q, k, v, positions, segment_ids, state) -> (out, state)
      the mixed values (B, T, H, V) and the state after the last token.
    init_state(batch, max_length, dtype)
      the state before the first token, float32 and of one size whatever the length.

    Attributes:
      num_heads: H.
      head_dim: width of a head, K and V. The state's shape depends on it, so it
        does not follow the model width.
      use_bias: gives all four projections a bias.
      causal: hides tokens that follow.
      chunk_size: tokens that the chunked form takes at once.
      dtype: of the projections; parameters are float32, and so is the mixing.
    """

    num_heads: int = 4
    head_dim: int = 64
    use_bias: bool = True
    causal: bool = True
    chunk_size: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Mixes the sequence; see `jaxmodels.layers.mixers` for the signature.

        Raises:
          ValueError: shapes disagree, a state of another batch or mixer, or a
            state without causality.
        """
        name = type(self).__name__
        check_call(name, x, positions, segment_ids)
        require_no_state_if_bidirectional(name, self.causal, state)
        if state is not None:
            check_state(name, state, jax.eval_shape(lambda: self.init_state(len(x), 0, x.dtype)))
        q = self._heads("q", self.key_width(), x)
        k = self._heads("k", self.key_width(), x)
        v = self._heads("v", self.head_dim, x)
        out, new_state = self.mix(q, k, v, positions, segment_ids, state)
        out = out.reshape(*x.shape[:-1], -1)
        out = Linear(x.shape[-1], use_bias=self.use_bias, dtype=self.dtype, name="out")(out)
        return out, None if state is None else new_state

    def key_width(self) -> int:
        """K, the width of a head's queries and keys."""
        return self.head_dim

    def _heads(self, name: str, width: int, x: Array) -> Array:
        project = Linear(
            self.num_heads * width, use_bias=self.use_bias, dtype=self.dtype, name=name
        )
        return project(x).reshape(*x.shape[:-1], self.num_heads, width)
