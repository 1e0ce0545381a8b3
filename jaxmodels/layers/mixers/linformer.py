"""The Linformer's attention: keys and values projected along the sequence.

Paper    Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity",
         section 4 (arXiv:2006.04768), with E and F shared by the heads of a layer.
"""

from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from jaxmodels.layers.mixers.inputs import token_positions
from jaxmodels.layers.mixers.projected import ProjectedMixer
from jaxmodels.ops.linformer import linformer_attention
from jaxmodels.registry import register_mixer


class LinformerAttention(ProjectedMixer):
    """Multi-head attention to `rank` mixtures of keys and values; bidirectional only.

    A token takes the rows of E and F for its position in the document, or for the
    one given in `positions`.

    Attributes, beyond those of `ProjectedMixer`:
      max_length: positions that E and F have rows for; longer sequences are refused.
      rank: R, how many mixtures of keys and of values.
    """

    causal: bool = False
    max_length: int = 1024
    rank: int = 128

    def mix(self, q, k, v, positions, segment_ids, state):
        """See `ProjectedMixer`.

        Raises:
          ValueError: causal, or a sequence longer than max_length.
        """
        length = q.shape[1]
        if self.causal:
            raise ValueError(
                "LinformerAttention: causal=True is not defined, every mixture of keys is over the "
                'whole sequence; use causal=False or a mixer such as "linear" or "performer"'
            )
        if length > self.max_length:
            raise ValueError(
                f"LinformerAttention: T={length} is longer than max_length={self.max_length}; its "
                f"projections have no rows for it. Set max_length={length} or more"
            )
        e, f = (
            self.param(name, nn.initializers.xavier_uniform(), (self.max_length, self.rank))
            for name in ("key_projection", "value_projection")
        )
        out = linformer_attention(
            q,
            k,
            v,
            e,
            f,
            positions=token_positions(q[:, :, 0], positions, segment_ids),
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )
        return out, None

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> Any:
        """There is none.

        Raises:
          ValueError: always; what a later token would add changes all earlier ones.
        """
        raise ValueError(
            "LinformerAttention: init_state is not defined, because it is bidirectional; for "
            'decoding use a causal mixer such as "linear" or "performer"'
        )


@register_mixer
def linformer(**overrides) -> LinformerAttention:
    """Linformer attention with projections shared by heads (Wang et al. 2020)."""
    return LinformerAttention(**overrides)
