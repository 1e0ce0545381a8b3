"""A set of tokens to one vector, by attention."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels import ops
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mlp import Mlp


class AttentionPool(nn.Module):
    """Multi-head attention pooling: one learned query looks at all tokens ("MAP head").

    h = W_out attention(W_q probe, W_k x, W_v x)
    out = h + mlp(layer_norm(h))

    Attributes:
      num_heads: of the attention; divides the width.
      mlp_ratio: hidden width of the feed-forward over width.
      norm_eps: epsilon of the norm.
      dtype: of the computation.

    Source: Zhai et al. 2022, "Scaling Vision Transformers", section 3.2
    (arXiv:2106.04560), from Lee et al. 2019, "Set Transformer" (arXiv:1810.00825);
    the same parameters and values as the head of SigLIP.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Returns one vector a sequence.

        Raises:
          ValueError: num_heads does not divide the width.
        """
        batch, _, width = x.shape
        if width % self.num_heads:
            raise ValueError(
                f"AttentionPool: num_heads={self.num_heads} does not divide the width {width}"
            )
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, width))
        probe = jnp.broadcast_to(probe[None].astype(x.dtype), (batch, 1, width))
        q, k, v = (
            self._project(name, tokens).reshape(batch, -1, self.num_heads, width // self.num_heads)
            for name, tokens in (("q", probe), ("k", x), ("v", x))
        )
        mixed = ops.dot_product_attention(q, k, v)
        pooled = self._project("out", mixed.reshape(batch, width))
        h = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(pooled)
        return pooled + Mlp(int(self.mlp_ratio * width), dtype=self.dtype, name="mlp")(h)

    def _project(self, name: str, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return Linear(x.shape[-1], dtype=self.dtype, name=name)(x)
