"""Linear attention: softmax replaced by an inner product of features.

Papers   Katharopoulos et al. 2020, "Transformers are RNNs", section 3
         (arXiv:2006.16236), with phi(x) = elu(x) + 1;
         Arora et al. 2024, "Simple linear attention language models balance the
         recall-throughput tradeoff" (Based), section 4.1 (arXiv:2402.18668), with
         the second-order Taylor series of exp and a small key width.
Differs  Based mixes linear attention with short convolutions and windows in other
         layers; this is its linear attention alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmodels.layers.mixers.projected import ProjectedMixer
from jaxmodels.ops.feature_maps import elu_plus_one, taylor_features
from jaxmodels.ops.linear_attention import linear_attention
from jaxmodels.registry import register_mixer


class LinearState(NamedTuple):
    """The sums of `ops.linear_attention` over the tokens so far: (B, H, M, V + 1)."""

    sums: Float[Array, "B H M S"]


class LinearAttention(ProjectedMixer):
    """Multi-head attention with phi(q) . phi(k) for exp(q . k / sqrt(K)).

    Attributes, beyond those of `ProjectedMixer`:
      feature_map: "elu", or "taylor" for 1 + l + l^2 / 2 with l = q . k / sqrt(K).
      key_dim: K, if not head_dim. Taylor features are 1 + K + K (K + 1) / 2, so
        Based takes 16.
    """

    feature_map: str = "elu"
    key_dim: int | None = None

    def key_width(self) -> int:
        """K, the width of a head's queries and keys before the feature map."""
        return self.key_dim or self.head_dim

    def mix(self, q, k, v, positions, segment_ids, state):
        """See `ProjectedMixer`; positions play no part beyond their order."""
        out, sums = linear_attention(
            self._features(q),
            self._features(k),
            v,
            causal=self.causal,
            initial_state=None if state is None else state.sums,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )
        return out, LinearState(sums)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> LinearState:
        """The state before the first token, float32 and of one size whatever the length."""
        key = jax.ShapeDtypeStruct((self.key_width(),), jnp.float32)
        (features,) = jax.eval_shape(self._features, key).shape
        return LinearState(jnp.zeros((batch, self.num_heads, features, self.head_dim + 1)))

    def _features(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        if self.feature_map == "elu":
            return elu_plus_one(x)
        if self.feature_map == "taylor":
            return taylor_features(x * self.key_width() ** -0.25)
        raise ValueError(
            f'LinearAttention: feature_map={self.feature_map!r} is neither "elu" nor "taylor"'
        )


@register_mixer
def linear(**overrides) -> LinearAttention:
    """Linear attention with elu(x) + 1 (Katharopoulos et al. 2020)."""
    return LinearAttention(**overrides)
