"""What the layers around the delta rules share: convolved inputs and unit keys."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.layers.mixers.recurrent import RecurrentMixer
from jaxmodels.layers.normalization import RMSNorm
from jaxmodels.layers.short_convolution import ShortConvolution
from jaxmodels.ops.delta_rule import unit_length


class DeltaState(NamedTuple):
    """The memory (B, H, K, V) of every head and the last inputs of the convolution."""

    memory: Float[Array, "B H K V"]
    convolved: Float[Array, "B P D"]


class DeltaMixer(RecurrentMixer):
    """A delta rule on q, k, v = silu(conv(W x)), with q and k of length 1.

    Attributes, beyond those of `RecurrentMixer`:
      conv_size: steps that the convolution sees.
      norm_eps: of the norm of each head's output.
    """

    conv_size: int = 4
    norm_eps: float = 1e-6

    def value_shape(self) -> tuple[int, int]:
        """Heads and width of the values."""
        return self.num_heads, self.head_dim

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> DeltaState:
        """The state before the first token; of one size, whatever `max_length`."""
        heads, width = self.value_shape()
        channels = sum(self._widths())
        return DeltaState(
            jnp.zeros((batch, heads, self.head_dim, width)),
            jnp.zeros((batch, self.conv_size - 1, channels), dtype),
        )

    def _widths(self) -> tuple[int, int, int]:
        keys = self.num_heads * self.head_dim
        return keys, keys, math.prod(self.value_shape())

    def convolve(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        state: DeltaState,
    ) -> tuple[
        Float[Array, "B T H K"],
        Float[Array, "B T H K"],
        Float[Array, "B T N V"],
        Float[Array, "B P F"],
    ]:
        """Queries and keys of length 1, values, and the convolution's next state."""
        widths = self._widths()
        conv = ShortConvolution(self.conv_size, dtype=self.dtype, name="conv")
        qkv, after = conv(
            self.project("qkv", x, sum(widths)), state=state.convolved, segment_ids=segment_ids
        )
        q, k, v = jnp.split(qkv, [widths[0], widths[0] + widths[1]], axis=-1)
        q, k = (y.reshape(*x.shape[:2], self.num_heads, self.head_dim) for y in (q, k))
        return unit_length(q), unit_length(k), v.reshape(*x.shape[:2], *self.value_shape()), after

    def strength(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """How much of what the memory holds for a key is replaced, a head of the values."""
        return nn.sigmoid(self.project("beta", x, self.value_shape()[0]).astype(jnp.float32))

    def finish(
        self, mixed: Float[Array, "B T H V"], gate: Float[Array, "B T F"] | None, width: int
    ) -> Float[Array, "B T D"]:
        """Norm of each head in float32, times the gate, mapped to `width`."""
        norm = RMSNorm(epsilon=self.norm_eps, dtype=jnp.float32, name="norm")
        mixed = norm(mixed).reshape(*mixed.shape[:2], -1)
        if gate is not None:
            mixed = mixed * gate
        return self.project("out", mixed, width)
