"""Softmax attention over all earlier tokens, or over a window of them.

Papers   Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762);
         the window of Beltagy et al. 2020, "Longformer", section 3.1
         (arXiv:2004.05150), as Mistral has it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.layers.attention import Attention
from jaxmodels.layers.mixers.cache import (
    KVCache,
    RollingCache,
    empty_cache,
    empty_rolling_cache,
    extend,
    tokens_seen,
)
from jaxmodels.layers.mixers.inputs import (
    check_call,
    check_state,
    require_no_state_if_bidirectional,
    token_positions,
)
from jaxmodels.layers.positions import Rotary, attended_keys
from jaxmodels.ops.segments import document_index
from jaxmodels.registry import register_mixer


class SoftmaxMixer(Attention):
    """`layers.Attention` with positions, documents and a cache.

    Attributes, beyond those of `Attention`:
      position: a scheme of `jaxmodels.layers.positions`, which says how the
        places of query and key enter. It may be exchanged after training.
      window: how many earlier tokens are seen, and later ones if not causal.
    """

    num_heads: int = 4
    head_dim: int | None = 64
    use_bias: bool = False
    causal: bool = True
    position: Any = Rotary()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: KVCache | RollingCache | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | RollingCache | None]:
        """Mixes the sequence; see `jaxmodels.layers.mixers` for the signature.

        Raises:
          ValueError: shapes disagree, a state without room or of another batch,
            or a state without causality.
        """
        name = type(self).__name__
        check_call(name, x, positions, segment_ids)
        require_no_state_if_bidirectional(name, self.causal, state)
        q, k, v = self._heads(x)
        if state is None:
            places = token_positions(x, positions, segment_ids)
            k = attended_keys(self.position, k, places)
            documents = None if segment_ids is None else document_index(segment_ids)
            out = self.position.attend(
                q,
                k,
                v,
                places,
                places,
                causal=self.causal,
                window=self.window,
                segment_ids=documents,
                **self._logit_options(),
            )
            return self._merge(out, x.shape[-1]), None

        room = state.k.shape[1] if isinstance(state, KVCache) else 0
        check_state(name, state, jax.eval_shape(lambda: self.init_state(len(x), room, x.dtype)))
        places = token_positions(x, positions, segment_ids, tokens_seen(state))
        k = attended_keys(self.position, k, places)
        state, seen = extend(state, k, v, places, segment_ids, name=name)
        out = self.position.attend(
            q,
            seen.k.astype(q.dtype),
            seen.v.astype(q.dtype),
            places,
            seen.positions,
            mask=self._in_window(seen.mask),
            **self._logit_options(),
        )
        return self._merge(out, x.shape[-1]), state

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> KVCache | RollingCache:
        """A cache of `max_length` tokens, or of the window alone, where there is one.

        Raises:
          ValueError: head_dim is None, so that the width of a key is not known.
        """
        if self.head_dim is None:
            raise ValueError(f"{type(self).__name__}: init_state needs head_dim; set the field")
        heads, widths = self.num_kv_heads or self.num_heads, (self.head_dim, self.head_dim)
        if self.window is None:
            return empty_cache(batch, max_length, heads, widths, dtype)
        return empty_rolling_cache(batch, self._left(), heads, widths, dtype)

    def _left(self) -> int:
        return self.window if isinstance(self.window, int) else self.window[0]

    def _in_window(self, mask: Bool[Array, "B 1 T S"]) -> Bool[Array, "B 1 T S"]:
        """With a rolling cache the queries are the last slots."""
        if self.window is None:
            return mask
        num_queries, num_slots = mask.shape[-2:]
        queries = jnp.arange(num_slots - num_queries, num_slots)
        near = jnp.arange(num_slots)[None, :] >= queries[:, None] - self._left()
        return mask & near[None, None]


@register_mixer
def softmax(**overrides) -> SoftmaxMixer:
    """Softmax attention over all tokens, with rotary positions."""
    return SoftmaxMixer(**overrides)


@register_mixer
def sliding_window(**overrides) -> SoftmaxMixer:
    """Softmax attention over the token itself and 127 to its left (right too if not causal)."""
    return SoftmaxMixer(**{"window": 127, **overrides})
