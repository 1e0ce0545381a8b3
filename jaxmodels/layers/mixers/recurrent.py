"""What the layers around gated recurrences share: their fields, checks and states."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mixers.inputs import check_call, check_state, require_causal


class RecurrentMixer(nn.Module):
    """A mixer whose memory has one size whatever the length, and looks back only.

    A mixer of this kind has two methods more:

    mix(x, positions, segment_ids, state) -> (out, state)
      the outputs for x after `state`, and the state after x.
    init_state(batch, max_length, dtype)
      the state before the first token, of one size whatever the length.

    Attributes:
      num_heads: H.
      head_dim: width of a head's keys, K, and of its values unless the mixer says
        otherwise. The state's shape depends on it, so it does not follow the model
        width.
      causal: must be True.
      form: "chunked", "parallel" or "recurrent"; how it is computed, not what.
      chunk_size: tokens that the chunked form takes at once.
      dtype: of the projections; parameters are float32, and so is the recurrence.
    """

    num_heads: int = 4
    head_dim: int = 64
    causal: bool = True
    form: str = "chunked"
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
          ValueError: shapes disagree, causal=False, an unknown form, or a state of
            another batch or mixer.
        """
        name = type(self).__name__
        check_call(name, x, positions, segment_ids)
        require_causal(name, self.causal, "its memory runs from left to right")
        before = state
        if state is None:
            before = self.init_state(len(x), 0, self.dtype)
        else:
            check_state(name, state, jax.eval_shape(lambda: self.init_state(len(x), 0, x.dtype)))
        out, after = self.mix(x, positions, segment_ids, before)
        if state is None:
            return out, None
        return out, jax.tree.map(lambda new, old: new.astype(old.dtype), after, before)

    def empty_memory(self, batch: int, value_dim: int | None = None) -> Float[Array, "B H K V"]:
        """The float32 matrix of every head before the first token; V is K if not given."""
        return jnp.zeros((batch, self.num_heads, self.head_dim, value_dim or self.head_dim))

    def recurrence_options(self, memory: Array, segment_ids: Array | None) -> dict[str, Any]:
        """What every recurrent op takes besides queries, keys, values and gates."""
        return {
            "initial_state": memory,
            "segment_ids": segment_ids,
            "form": self.form,
            "chunk_size": self.chunk_size,
        }

    def project(self, name: str, x: Array, features: int, use_bias: bool = False) -> Array:
        """A linear map with parameters `name`."""
        return Linear(features, use_bias=use_bias, dtype=self.dtype, name=name)(x)

    def project_heads(self, name: str, x: Array, width: int | None = None) -> Array:
        """A linear map to (B, T, H, width); the width is head_dim if not given."""
        width = width or self.head_dim
        return self.project(name, x, self.num_heads * width).reshape(*x.shape[:2], -1, width)
