"""Which axis of which parameter the mesh axes `tensor` and `expert` split.

A matrix split by columns gives each device some of the outputs, whole; one split
by rows takes these as its inputs and gives partial sums, which are added up. A
column matrix followed by a row matrix therefore needs one all-reduce and no other
exchange: heads in attention, hidden units in a feed-forward. The rules go by the
names that layers share, so a new model has them by using the layers.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (arXiv:1909.08053); experts
from Lepikhin et al. 2020, "GShard", section 3.1 (arXiv:2006.16668).
"""

import re
from collections.abc import Mapping

from jax.sharding import PartitionSpec

_COLUMN = "q|k|v|q_up|kv_up|gate|up|forget|input|output|head|decay_up|gate_up|modulation/project"
_ROW = "out|down"

# A pattern that ends the path, and what splits the last axes of such a parameter: models
# that scan over their blocks have one more in front.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"mlp/(gate|up)", PartitionSpec("expert", None, "tensor")),
    (r"mlp/down", PartitionSpec("expert", "tensor", None)),
    (rf"({_COLUMN})/kernel", PartitionSpec(None, "tensor")),
    (rf"({_COLUMN})/bias", PartitionSpec("tensor")),
    (rf"({_ROW})/kernel", PartitionSpec("tensor", None)),
    (r"embed/embedding", PartitionSpec("tensor", None)),
    # The first two convolutions of a residual branch; normalisation goes by channels.
    (r"conv_1/conv/kernel", PartitionSpec(None, None, None, "tensor")),
    (r"conv_1/norm/(scale|bias|mean|var)", PartitionSpec("tensor")),
    (r"conv_2/conv/kernel", PartitionSpec(None, None, "tensor", None)),
)
_COMPILED = tuple((re.compile(rf"(^|/)({pattern})$"), spec) for pattern, spec in RULES)


def named_axes(
    name: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """For each axis of a parameter, the mesh axis that its name gives it, or None.

    An axis that does not divide stays whole, as the vocabulary of GPT-2 does, and
    so does a parameter of fewer dimensions than its rule, as factored moments are.

    Args:
      name: its path, `block_0/mlp/up/kernel`; what comes before the layer is free.
      shape: of the array.
      sizes: of the mesh axes; those it lacks are not split over.
    """
    whole = (None,) * len(shape)
    spec = next((spec for pattern, spec in _COMPILED if pattern.search(name)), None)
    if spec is None or len(spec) > len(shape):
        return whole
    ends = (*whole[len(spec) :], *spec)
    return tuple(
        axis if axis is not None and sizes.get(axis, 1) > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(ends, shape, strict=True)
    )
