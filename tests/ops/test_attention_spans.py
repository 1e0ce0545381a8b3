"""Blocks cover what rows see, by the definition, and no more than they must."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from jaxmodels.ops import attention_spans

sides = st.none() | st.integers(0, 40)


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(-20, 20), st.tuples(sides, sides))
@example(90, 90, 0, (5, 2))
@example(37, 90, 20, (0, 0))
def test_every_pair_is_in_its_block_and_edges_tell_the_hidden(rows, columns, offset, window):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MIN_ROWS": 3,
            "WINDOW_ROWS": 7,
            "MAX_ROWS": 11,
            "MAX_SPANS": 3,
        }.items():
            patch.setattr(attention_spans, name, value)
        spans = attention_spans.cut(rows, columns, 1, offset, window)
    left, right = (np.inf if side is None else side for side in window)
    distance = np.arange(columns)[None] - np.arange(rows)[:, None] - offset
    seen = (distance >= -left) & (distance <= right)
    done = np.zeros(rows, int)
    for span in spans:
        for i in range(span.count):
            mine = slice(span.start + i * span.rows, span.start + (i + 1) * span.rows)
            done[mine] += 1
            low = int(span.first_column(jnp.int32(i)))
            assert 0 <= low <= low + span.width <= columns
            inside = np.zeros(columns, bool)
            inside[low : low + span.width] = True
            assert not (seen[mine] & ~inside).any()
            told = np.zeros(span.width, bool)
            for a, b in span.edges:
                told[a:b] = True
            assert seen[mine, low : low + span.width][:, ~told].all()
    assert (done == 1).all()


@pytest.mark.parametrize("window", [(64, 0), (32, 32)])
def test_blocks_of_a_window_grow_with_the_length_alone(window):
    def area(length):
        spans = attention_spans.cut(length, length, 1, 0, window)
        return sum(span.count * span.rows * span.width for span in spans)

    assert area(65536) <= 16.01 * area(4096)
    assert area(65536) <= 65536 * (sum(window) + 257)
