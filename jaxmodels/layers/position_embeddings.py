"""Positions as vectors that are added to the tokens' embeddings."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels.ops.positions import sincos_positions


class LearnedPositions(nn.Module):
    """A learned vector a position.

    The parameter `embedding` is (max_length, D). Positions it does not have give
    NaN, so that a model does not silently see a position that it was not asked for.

    Attributes:
      max_length: how many positions there are.
      width: D.
      dtype: of the result.

    Source: Gehring et al. 2017 (arXiv:1705.03122), as in GPT-2.
    """

    max_length: int
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, positions: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns the vectors of the positions."""
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (self.max_length, self.width))
        known = (positions >= 0) & (positions < self.max_length)
        rows = jnp.where(known, positions, 0)
        return jnp.where(known[..., None], table[rows], jnp.nan).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class SinusoidalPositions:
    """Fixed sine and cosine features of a position; see `ops.positions.sincos_positions`.

    Attributes:
      width: D.
      dtype: of the result.

    Source: Vaswani et al. 2017, section 3.5 (arXiv:1706.03762).
    """

    width: int
    dtype: DTypeLike = jnp.float32

    def __call__(self, positions: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns the features of the positions."""
        return sincos_positions(positions, self.width).astype(self.dtype)
