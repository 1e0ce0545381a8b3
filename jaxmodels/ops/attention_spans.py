"""How blocked attention cuts its rows into blocks, and which columns each block meets.

Rows are queries and columns keys in the forward pass, the other way round in the
backward pass: row r sees columns r + offset - left to r + offset + right.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmodels.ops.attention_naive import Window

# Rows of a block: many make products efficient, few skip more of what a window hides.
MIN_ROWS, WINDOW_ROWS, MAX_ROWS = 32, 256, 1024
# Logits in a block at the most, which bounds memory.
MAX_LOGITS = 1 << 23
# Blocks written out one after the other, each with its own range of columns.
# Beyond this many, neighbours share a range and a loop: compile time is bounded.
MAX_SPANS = 8


class Span(NamedTuple):
    """`count` blocks of `rows` rows from `start`, each of which meets `width` columns.

    They begin at column `low`, or `stride` further on with each block, but never
    so far that they would not fit. `edges` are the ranges of the columns, counted
    from the first, that some of the rows do not see.
    """

    start: int
    rows: int
    count: int
    low: int
    stride: int
    width: int
    num_columns: int
    edges: tuple[tuple[int, int], ...]

    def first_column(self, block: Int[Array, ""]) -> int | Int[Array, ""]:
        """Where the columns of a block begin."""
        if self.stride == 0:
            return self.low
        return jnp.clip(self.low + block * self.stride, 0, self.num_columns - self.width)


def most_rows(window: Window, num_rows: int) -> int:
    """Rows of a block if memory were no matter."""
    if window == (None, None):
        return MAX_ROWS
    if None not in window:
        return WINDOW_ROWS
    return min(MAX_ROWS, max(WINDOW_ROWS, num_rows // MAX_SPANS))


def most_columns(window: Window, num_rows: int, num_columns: int) -> int:
    """Columns that such a block meets at the most."""
    if None in window:
        return num_columns
    return min(num_columns, min(WINDOW_ROWS, num_rows) + sum(window))


def cut(num_rows: int, num_columns: int, batch: int, offset: int, window: Window) -> list[Span]:
    """Cuts all rows into blocks, and those into spans of equal ones."""
    most = most_rows(window, num_rows)
    columns = most_columns(window, num_rows, num_columns)
    rows = max(MIN_ROWS, min(most, MAX_LOGITS // (batch * columns)))
    rows = -(-num_rows // -(-num_rows // rows))
    full, rest = divmod(num_rows, rows)
    slides = None not in window and rows + sum(window) < num_columns
    # Blocks that meet the same columns are one loop: written out they would run side by
    # side, each with logits of its own, and leave the cache.
    alike = slides or window == (None, None)
    count = full if alike else -(-full // MAX_SPANS)
    cuts = [(first * rows, rows, min(count, full - first)) for first in range(0, full, count)]
    if rest:
        cuts.append((full * rows, rest, 1))
    make = _sliding if slides else _standing
    return [make(*cut, num_columns, offset, window) for cut in cuts]


def _sliding(start, rows, count, num_columns: int, offset: int, window: Window) -> Span:
    """Blocks that each meet the columns of their own window."""
    left, right = window
    width = rows + left + right
    return Span(start, rows, count, start + offset - left, rows, width, num_columns, ((0, width),))


def _standing(start, rows, count, num_columns: int, offset: int, window: Window) -> Span:
    """Blocks that all meet the columns that any of them sees."""
    left, right = window
    first, last = start + offset, start + offset + count * rows - 1

    def clip(column, low=0):
        return min(max(low, column), num_columns)

    low = 0 if left is None else clip(first - left)
    high = num_columns if right is None else clip(last + right + 1, low)
    # All rows see what lies between the last row's left and the first row's right.
    all_low = 0 if left is None else min(clip(last - left), high)
    all_high = num_columns if right is None else clip(first + right + 1, low)
    edges = ((low, all_low), (all_high, high)) if all_low < all_high else ((low, high),)
    edges = tuple((a - low, b - low) for a, b in edges if a < b)
    return Span(start, rows, count, low, 0, high - low, num_columns, edges)
