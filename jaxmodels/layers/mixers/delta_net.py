"""DeltaNet: linear attention that corrects its memory.

Paper    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule
         over Sequence Length", section 3.3 (arXiv:2406.06484): short convolutions
         and SiLU, L2-normalised queries and keys, a norm of each head.
"""

from jaxmodels.layers.mixers.delta_mixer import DeltaMixer, DeltaState
from jaxmodels.ops.delta_rule import delta_rule
from jaxmodels.registry import register_mixer


class DeltaNet(DeltaMixer):
    """The delta rule with a data-dependent write strength a head.

    q, k, v = silu(conv(W x)),   beta = sigmoid(W_beta x)
    out = W_out rms_norm_h(delta_rule(q / |q|, k / |k|, v, beta)_h)

    Attributes: those of `DeltaMixer`.
    """

    def mix(self, x, positions, segment_ids, state):
        """See `RecurrentMixer`; positions play no part beyond their order."""
        q, k, v, convolved = self.convolve(x, segment_ids, state)
        options = self.recurrence_options(state.memory, segment_ids)
        mixed, memory = delta_rule(q, k, v, self.strength(x), **options)
        return self.finish(mixed, None, x.shape[-1]), DeltaState(memory, convolved)


@register_mixer
def delta(**overrides) -> DeltaNet:
    """DeltaNet (Yang et al. 2024)."""
    return DeltaNet(**overrides)
