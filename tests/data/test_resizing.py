"""The two rules of scaling, against their sentence and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.data import FixedSize, ShortestSide


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=9),
    rule=st.builds(
        lambda low, more, multiple: ShortestSide(low, low + more, multiple),
        st.integers(1, 900),
        st.integers(0, 900),
        st.sampled_from([1, 7, 32]),
    ),
)
def test_the_shorter_side_unless_the_longer_is_too_long(sizes, rule):
    sizes = np.array(sizes)
    got = rule.resized(sizes)
    for size, new, group in zip(sizes, got, rule.groups(sizes), strict=True):
        want = rule.shortest / min(size)
        if max(size) * want > rule.longest:
            want = rule.longest / max(size)
        # Half a pixel at most, but never less than one.
        assert np.all(np.abs(new - np.maximum(size * want, 1)) <= 0.5 + 1e-6)
        assert np.all(new <= rule.shapes[group]) and np.all(new >= 1)
    for shape in rule.shapes:
        assert all(side % rule.multiple == 0 for side in shape)
        assert 0 <= min(shape) - rule.shortest < rule.multiple
        assert 0 <= max(shape) - rule.longest < rule.multiple


def test_sizes_by_hand():
    rule = ShortestSide(800, 1333)
    assert rule.shapes == ((800, 1344), (1344, 800))
    sizes = np.array([[480, 640], [640, 480], [100, 500], [500, 500]])
    wanted = [[800, 1067], [1067, 800], [267, 1333], [800, 800]]
    np.testing.assert_array_equal(rule.resized(sizes), wanted)
    np.testing.assert_array_equal(rule.groups(sizes), [0, 1, 0, 0])
    fixed = FixedSize(5, 7)
    np.testing.assert_array_equal(fixed.resized(sizes), [[5, 7]] * 4)
    np.testing.assert_array_equal(fixed.groups(sizes), [0] * 4)
    assert fixed.shapes == ((5, 7),)


@pytest.mark.parametrize(
    ("rule", "numbers", "message"),
    [
        (
            ShortestSide,
            (5, 4),
            r"ShortestSide\(shortest=5, longest=4, multiple=32\): give 1 <= sho",
        ),
        (ShortestSide, (0, 4), "give 1 <= shortest <= longest"),
        (ShortestSide, (3, 4, 0), "a multiple of at least 1"),
        (FixedSize, (3, 0), r"FixedSize\(rows=3, columns=0\): give at least 1 row"),
    ],
)
def test_impossible_numbers_are_named(rule, numbers, message):
    with pytest.raises(ValueError, match=message):
        rule(*numbers)
