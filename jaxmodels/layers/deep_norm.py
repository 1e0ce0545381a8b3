"""Residual connections that let a post-norm transformer be a thousand layers deep."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.normalization import LayerNorm


def deep_norm_scales(num_blocks: int) -> tuple[float, float]:
    """How much DeepNorm weighs the skip, and how small it initialises the branches.

    alpha = (2 N)^(1/4),   beta = (8 N)^(-1/4)

    Args:
      num_blocks: N, transformer blocks (an attention and a feed-forward each) of an
        encoder or of a decoder.

    Returns:
      alpha, and the gain beta of the feed-forward's matrices and of attention's value
      and output ones; queries and keys keep the gain 1.

    Raises:
      ValueError: num_blocks is below 1.

    Source: Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers",
    figure 2 (arXiv:2203.00555).
    """
    if num_blocks < 1:
        raise ValueError(f"deep_norm_scales: num_blocks={num_blocks} must be at least 1")
    return (2 * num_blocks) ** 0.25, (8 * num_blocks) ** -0.25


class DeepNorm(nn.Module):
    """Adds a branch to a skip that counts more, and normalises the sum.

    out = LayerNorm(alpha x + branch)

    With branches initialised smaller by beta the expected change of the output in a
    step of training does not grow with depth, as that of plain post-norm does.

    Attributes:
      num_blocks: N of `deep_norm_scales`.
      epsilon: of the norm.
      dtype: of the output; the norm is computed in float32.

    Source: Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers",
    figure 2 (arXiv:2203.00555).
    """

    num_blocks: int
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B D"], branch: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        """Returns the normalised sum.

        Args:
          x: what came into the block.
          branch: what attention or a feed-forward made of it.
        """
        alpha, _ = deep_norm_scales(self.num_blocks)
        return LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(alpha * x + branch)
