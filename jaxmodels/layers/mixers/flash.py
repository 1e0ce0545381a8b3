"""FLASH: the gated attention unit with mixed chunk attention, in linear time.

Paper    Hua et al. 2022, "Transformer Quality in Linear Time", section 3.2 and the
         code of appendix B (arXiv:2202.10447).
Differs  as `layers.mixers.gau`, and `ops.mixed_chunk_attention` for the linear part.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mixers.gau import GatedInputs, RotaryBias
from jaxmodels.layers.mixers.inputs import (
    check_call,
    check_state,
    require_no_state_if_bidirectional,
    token_positions,
)
from jaxmodels.ops.mixed_chunk_attention import (
    MixedChunkState,
    empty_mixed_chunk_state,
    mixed_chunk_attention,
)
from jaxmodels.registry import register_mixer


class FlashMixer(nn.Module):
    """Gated attention unit, quadratic inside a chunk and linear between chunks.

    out = W_out (u * mixed_chunk_attention(q_quad, k_quad, q_lin, k_lin, v))

    All four queries and keys are of one z, see `GatedInputs`.

    Attributes:
      head_dim: s, width of queries and keys.
      value_dim: e, width of values and gate. The paper takes twice the model's
        width, and so does None; but then there is no `init_state`.
      chunk_size: C, counted from the beginning of each document.
      kernel: of the quadratic part, "relu2" or "softmax".
      causal: hides tokens that follow.
      dtype: of the computation; parameters are float32.
    """

    head_dim: int = 128
    value_dim: int | None = 512
    chunk_size: int = 256
    kernel: str = "relu2"
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: MixedChunkState | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], MixedChunkState | None]:
        """Mixes the sequence; see `jaxmodels.layers.mixers` for the signature.

        Raises:
          ValueError: shapes disagree, a state of another batch or mixer, or a state
            without causality.
        """
        name = type(self).__name__
        check_call(name, x, positions, segment_ids)
        require_no_state_if_bidirectional(name, self.causal, state)
        seen = None
        if state is not None:
            check_state(name, state, jax.eval_shape(lambda: self.init_state(len(x), 0, x.dtype)))
            seen = state.length
        places = token_positions(x, positions, segment_ids, seen)
        value_dim = self.value_dim or 2 * x.shape[-1]
        inputs = GatedInputs(4, self.head_dim, value_dim, self.dtype, name="inputs")
        u, v, (quad_q, quad_k, lin_q, lin_k) = inputs(x, places)
        # A chunk size below one is refused by the op.
        chunk_size = max(1, self.chunk_size)
        scale = self.head_dim**-0.5 if self.kernel == "softmax" else 1.0 / chunk_size
        a, b = RotaryBias(self.head_dim, name="bias")(places, places)
        # One product gives the logits with their bias.
        quad_q = jnp.concatenate([scale * quad_q, a.astype(quad_q.dtype)], -1)
        quad_k = jnp.concatenate([quad_k, b.astype(quad_k.dtype)], -1)
        out, new_state = mixed_chunk_attention(
            quad_q,
            quad_k,
            lin_q,
            lin_k,
            v,
            kernel=self.kernel,
            causal=self.causal,
            chunk_size=self.chunk_size,
            segment_ids=segment_ids,
            initial_state=state,
        )
        out = Linear(x.shape[-1], dtype=self.dtype, name="out")(u * out)
        return out, None if state is None else new_state

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> MixedChunkState:
        """The state before the first token; max_length does not matter.

        Raises:
          ValueError: value_dim is None, so that the width of a value is not known.
        """
        if self.value_dim is None:
            raise ValueError(f"{type(self).__name__}: init_state needs value_dim; set the field")
        widths = 2 * self.head_dim, self.head_dim, self.value_dim
        return empty_mixed_chunk_state(batch, self.chunk_size, widths, dtype)


@register_mixer
def flash(**overrides) -> FlashMixer:
    """FLASH: mixed chunk attention in a gated attention unit."""
    return FlashMixer(**overrides)
