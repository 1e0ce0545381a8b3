"""What convolutions and pools share: the geometry of windows that slide over an image."""

from typing import TypeAlias

Pair: TypeAlias = int | tuple[int, int]
Padding: TypeAlias = int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]


def pair(function: str, name: str, value: Pair, *, minimum: int = 1) -> tuple[int, int]:
    """Returns (y, x) of a value that may be given once for both.

    Raises:
      ValueError: naming the function and argument whose value is below `minimum`.
    """
    y, x = (value, value) if isinstance(value, int) else value
    if min(y, x) < minimum:
        raise ValueError(
            f"{function}: {name}={value} must be at least {minimum} in both directions"
        )
    return y, x


def padding_pairs(function: str, padding: Padding) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns ((top, bottom), (left, right)) of a padding given in any of three ways.

    Raises:
      ValueError: naming the function, where a padding is negative.
    """
    y, x = (padding, padding) if isinstance(padding, int) else padding
    sides = tuple((side, side) if isinstance(side, int) else tuple(side) for side in (y, x))
    if min(min(side) for side in sides) < 0:
        raise ValueError(f"{function}: padding={padding} must not be negative; crop the image")
    return sides


def window_counts(
    function: str,
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """Number of places of a window along y and x.

    count = (size + before + after - dilation (kernel - 1) - 1) // stride + 1

    Raises:
      ValueError: naming the function, where the padded image is smaller than the window.
    """
    counts = tuple(
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, k, s, (before, after), d in zip(
            size, kernel_size, stride, padding, dilation, strict=True
        )
    )
    if min(counts) < 1:
        raise ValueError(
            f"{function}: an image of {size[0]} x {size[1]} pixels with padding {padding} is "
            f"smaller than the window {kernel_size} with dilation {dilation}; pad it or take a "
            f"larger image"
        )
    return counts
