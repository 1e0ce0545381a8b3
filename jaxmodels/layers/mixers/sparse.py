"""Softmax attention to a fixed pattern of tokens.

Paper    Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
         section 4.3 and the merged head of section 5.2 (arXiv:1904.10509).
Differs  rotary positions, where the paper adds learned ones to the embeddings.
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
from jaxmodels.ops.attention import dot_product_attention
from jaxmodels.ops.attention_sparse import sparse_attention, sparse_mask
from jaxmodels.ops.rotary import rotary_angles, rotary_frequencies, rotate
from jaxmodels.registry import register_mixer


class SparseMixer(nn.Module):
    """Multi-head attention in which every head sees the same pattern of tokens.

    A call with a state compares its tokens with all of the cache, under the mask of
    the pattern; without one, no T * T logits exist.

    Attributes:
      num_heads, num_kv_heads: query heads, and key/value heads (as many if None).
      head_dim: width of a head.
      pattern, stride, window, summary: as in `ops.attention_sparse.sparse_attention`.
        Patterns without a stride need stride=None.
      use_bias: gives all four projections a bias.
      causal: hides tokens that follow.
      rotary_base: see `ops.rotary.rotary_frequencies`.
      dtype: of the computation; parameters are float32.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int = 64
    pattern: str = "strided"
    stride: int | None = 32
    window: int | None = None
    summary: int | None = None
    use_bias: bool = False
    causal: bool = True
    rotary_base: float = 10_000.0
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
          ValueError: shapes disagree, options do not belong to the pattern, a state
            without room or of another batch, or a state without causality.
        """
        name = type(self).__name__
        check_call(name, x, positions, segment_ids)
        require_no_state_if_bidirectional(name, self.causal, state)
        kv_heads = self.num_kv_heads or self.num_heads
        q = self._project("q", self.num_heads, x)
        k = self._project("k", kv_heads, x)
        v = self._project("v", kv_heads, x)
        seen = None
        if state is not None:
            room = state.k.shape[1] if isinstance(state, KVCache) else 0
            check_state(name, state, jax.eval_shape(lambda: self.init_state(len(x), room, x.dtype)))
            seen = tokens_seen(state)
        positions = token_positions(x, positions, segment_ids, seen)
        angles = rotary_angles(positions, rotary_frequencies(self.head_dim, self.rotary_base))
        q, k = rotate(q, angles), rotate(k, angles)
        pattern = {"pattern": self.pattern, "stride": self.stride, "window": self.window}
        pattern |= {"summary": self.summary, "causal": self.causal}
        if state is None:
            out = sparse_attention(q, k, v, segment_ids=segment_ids, **pattern)
        else:
            out, state = self._continue(q, k, v, positions, segment_ids, state, pattern)
        out = out.reshape(*x.shape[:2], -1)
        out = Linear(x.shape[-1], use_bias=self.use_bias, dtype=self.dtype, name="out")(out)
        return out, state

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> KVCache:
        """A cache for `max_length` tokens."""
        heads = self.num_kv_heads or self.num_heads
        return empty_cache(batch, max_length, heads, (self.head_dim, self.head_dim), dtype)

    def _project(self, name, heads, x):
        width = heads * self.head_dim
        x = Linear(width, use_bias=self.use_bias, dtype=self.dtype, name=name)(x)
        return x.reshape(*x.shape[:2], heads, self.head_dim)

    def _continue(self, q, k, v, positions, segment_ids, state, pattern):
        """Attends to the cache. Places are counted, whatever positions the caller gave."""
        if state.among is not None:
            raise ValueError(
                f"{type(self).__name__}: a tree of alternatives has no strides; let the state's "
                f"among be None, and speculative decoding draft chains"
            )
        slots, length = state.k.shape[1], q.shape[1]
        count = jnp.sum(state.documents == 0, axis=1)
        places = token_positions(q[:, :, 0], None, segment_ids, count)
        own = state.length + jnp.arange(length)
        distance = own[:, None] - jnp.arange(slots)[None, :]
        keys = places[:, :, None] - distance[None]
        state, seen = extend(state, k, v, positions, segment_ids, name=type(self).__name__)
        mask = seen.mask & sparse_mask(places[:, :, None], keys, **pattern)[:, None]
        k, v = seen.k.astype(q.dtype), seen.v.astype(q.dtype)
        return dot_product_attention(q, k, v, mask=mask), state


@register_mixer
def sparse(**overrides) -> SparseMixer:
    """The Sparse Transformer's strided attention: 32 tokens back, and every 32nd."""
    return SparseMixer(**overrides)
