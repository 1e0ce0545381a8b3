"""Which pixels a stack of dilated convolutions reads, and schedules that skip none."""

from collections.abc import Sequence

import numpy as np


def covered_offsets(kernel_size: int, dilations: Sequence[int]) -> np.ndarray:
    """Where, along one axis, a stack of dilated convolutions reads its input.

    { sum_l d_l j_l : j_l in -(K - 1)/2 .. (K - 1)/2 }

    An output pixel reads the product of this set with itself: the pixels of a
    square if the set has no holes, a grid of isolated ones if it has
    ("gridding").

    Args:
      kernel_size: K of every layer, odd.
      dilations: of the layers; the order does not matter.

    Returns:
      Offsets from the output pixel, ascending; there are holes if they are fewer
      than 1 + sum_l d_l (K - 1).

    Raises:
      ValueError: the kernel size is even, or a dilation less than one.

    Source: Wang et al. 2018, "Understanding Convolution for Semantic
    Segmentation", section 3.2 and figure 2 (arXiv:1702.08502).
    """
    _check("covered_offsets", kernel_size, dilations)
    half = kernel_size // 2
    offsets = np.zeros(1, int)
    for dilation in dilations:
        taps = dilation * np.arange(-half, half + 1)
        offsets = np.unique(offsets[:, None] + taps[None, :])
    return offsets


def meets_hybrid_condition(kernel_size: int, dilations: Sequence[int]) -> bool:
    """Whether the paper's bound on the distance between read pixels holds.

    M_n = d_n,  M_l = max(M_(l+1) - 2 d_l, 2 d_l - M_(l+1), d_l),  M_2 <= K,
    and the dilations have no common divisor

    The bound speaks of a stack that begins with dilation 1, which the first layer
    must have for a region without holes up to its edge, and counts on no more than
    the three middle places of a larger kernel; `covered_offsets` decides exactly.

    Args:
      kernel_size: K of every layer, odd.
      dilations: of the layers, the first next to the input.

    Raises:
      ValueError: the kernel size is even, or a dilation less than one.

    Source: Wang et al. 2018, section 3.2, equation 2 (arXiv:1702.08502).
    """
    _check("meets_hybrid_condition", kernel_size, dilations)
    if len(dilations) == 1:
        return dilations[0] == 1
    gap = dilations[-1]
    for dilation in reversed(dilations[1:-1]):
        gap = max(gap - 2 * dilation, 2 * dilation - gap, dilation)
    return gap <= kernel_size and bool(np.gcd.reduce(dilations) == 1)


def hybrid_dilations(depth: int, rate: int, kernel_size: int = 3) -> tuple[int, ...]:
    """A schedule that sees as far as `depth` layers of constant `rate`, without holes.

    d_1 = 1,  d_l <= 1 + (K - 1) (d_1 + ... + d_(l-1)),  sum_l d_l = depth * rate

    The dilations rise from 1 as evenly as the bound in the middle lets them: a
    layer may step no farther than what those before it have covered.
    `hybrid_dilations(3, 2)` is the paper's (1, 2, 3).

    Args:
      depth: number of layers.
      rate: the constant dilation that is replaced.
      kernel_size: K of every layer, odd.

    Returns:
      One dilation a layer, ascending.

    Raises:
      ValueError: the rate is too large for so few layers.

    Source: the requirements are those of Wang et al. 2018, section 3.2
    (arXiv:1702.08502); the paper gives schedules but no rule for finding them.
    """
    _check("hybrid_dilations", kernel_size, (depth, rate))
    schedule, left = [1], depth * rate - 1
    for remaining in range(depth - 1, 0, -1):
        covered = 1 + (kernel_size - 1) * sum(schedule)
        # Of an arithmetic progression from here whose sum is what is left.
        step = 2 * (left / remaining - schedule[-1]) / (remaining + 1)
        schedule.append(min(schedule[-1] + round(step), covered))
        left -= schedule[-1]
    if left:
        largest = sum(kernel_size**layer for layer in range(depth)) // depth
        raise ValueError(
            f"hybrid_dilations: no schedule of depth={depth} with kernel_size={kernel_size} sees "
            f"as far as rate={rate} without holes; the largest rate is {largest}"
        )
    return tuple(schedule)


def _check(function: str, kernel_size: int, positive: Sequence[int]) -> None:
    if kernel_size % 2 == 0 or kernel_size < 1:
        raise ValueError(f"{function}: kernel_size={kernel_size} must be odd, to have a centre")
    if not positive or min(positive) < 1:
        raise ValueError(f"{function}: {tuple(positive)} must not be empty nor less than one")
