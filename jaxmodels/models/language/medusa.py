"""Medusa: heads beside a frozen language model that guess the tokens after the next one.

Paper    Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with
         Multiple Decoding Heads" (arXiv:2401.10774): the heads of section 2.1.1, and
         their training beside a frozen model (Medusa-1) of section 2.2.1. Trees of
         candidates are `ops.candidate_tree`, rules of acceptance `ops.speculative`,
         decoding `decoding.speculative_generate` with a `decoding.MedusaDraft`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Key

from jaxmodels.layers.linear import Linear
from jaxmodels.models.language.multi_token import targets_ahead
from jaxmodels.ops.cross_entropy import chunked_cross_entropy


class MedusaHead(nn.Module):
    """What one head reads its logits from: h + silu(W h + b), block after block.

    Attributes:
      depth: number of blocks.
      dtype: of the computation.
    """

    depth: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns vectors of h's shape, at first h itself."""
        for i in range(self.depth):
            block = Linear(
                h.shape[-1],
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            h = h + jax.nn.silu(block(h))
        return h


class MedusaHeads(nn.Module):
    """Heads for the second, third ... token after the one that the model has read.

    logits_k = U_k head_k(h),   h what the model reads the next token's logits from

    Attributes:
      vocab_size: V.
      heads: how many.
      depth: residual blocks of each.
      dtype: of the computation; parameters are float32.
    """

    vocab_size: int
    heads: int = 4
    depth: int = 1
    dtype: Dtype = jnp.float32

    def setup(self):
        """Makes the heads and their unembeddings."""
        self.head = [MedusaHead(self.depth, self.dtype) for _ in range(self.heads)]
        unembed = {"use_bias": False, "dtype": self.dtype}
        self.unembed = [Linear(self.vocab_size, **unembed) for _ in range(self.heads)]

    def __call__(self, h: Float[Array, "*B D"]) -> Float[Array, "*B N V"]:
        """Logits of all heads, in float32."""
        pairs = zip(self.vectors(h), self.unembed, strict=True)
        return jnp.stack([unembed(x) for x, unembed in pairs], axis=-2).astype(jnp.float32)

    def vectors(self, h: Float[Array, "*B D"]) -> list[Float[Array, "*B D"]]:
        """What each head's unembedding reads."""
        return [head(h) for head in self.head]

    @nn.nowrap
    def begin_with(self, kernel: Float[Array, "D V"]) -> dict[str, Any]:
        """Parameters whose heads all say what the model says of the next token.

        Args:
          kernel: the model's unembedding, `model.output_kernel(params)`.

        Raises:
          ValueError: the kernel is of another vocabulary.
        """
        if kernel.shape[-1] != self.vocab_size:
            raise ValueError(
                f"MedusaHeads: kernel {kernel.shape} must be (D, vocab_size={self.vocab_size}), "
                f"the unembedding of the model beside which the heads stand"
            )
        params = self.init(jax.random.key(0), jnp.zeros((1, len(kernel))))["params"]
        copies = {f"unembed_{k}": {"kernel": jnp.array(kernel)} for k in range(self.heads)}
        return {**params, **copies}

    @nn.nowrap
    def loss(
        self,
        params: Mapping[str, Any],
        batch: Mapping[str, Array],
        key: Key[Array, ""] | None,
        model_state: Mapping[str, Any] | None = None,
        *,
        decay: float = 0.8,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Mapping[str, Any]]:
        """What the heads are trained by, in the form that `training.make_step` takes.

        loss = sum over heads k of decay^k cross entropy of the token k after the next

        The model is frozen: its vectors come with the batch.

        Args:
          params: the heads' parameters.
          batch: "hidden" (B, T, D), the model's of "tokens"; "targets" (B, T), the
            next tokens; and if it is packed, "segment_ids" and "weights" (B, T).
          key: of nothing.
          model_state: none.
          decay: lambda, by which later heads count less.

        Returns:
          The loss, the cross entropy of each head, and model_state.

        Source: equation 1 of the paper.
        """
        variables = {"params": params}
        vectors = self.apply(variables, batch["hidden"], method="vectors")
        total, terms = jnp.float32(0), {}
        for k, h in enumerate(vectors, 1):
            kernel = params[f"unembed_{k - 1}"]["kernel"].astype(h.dtype)
            loss, _ = chunked_cross_entropy(h, kernel, *targets_ahead(batch, k))
            total = total + decay**k * loss
            terms[f"cross_entropy_{k}"] = loss
        return total, terms, model_state or {}
