"""Nearest neighbours against all pairs."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.metrics import nearest_neighbour_distances


def all_pairs(queries, references):
    return np.linalg.norm(queries[:, None].astype(float) - references[None].astype(float), axis=-1)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.tuples(st.integers(1, 31), st.integers(1, 37)),
    width=st.sampled_from([1, 3, 17]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_equals_the_minimum_over_all_pairs(rows, width, dtype, seed):
    rng = np.random.default_rng(seed)
    queries, references = (rng.normal(size=(n, width)).astype(dtype) for n in rows)
    got = nearest_neighbour_distances(queries, references)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, all_pairs(queries, references).min(1), rtol=1e-12)


def test_exclude_self_leaves_out_the_row_but_not_its_copy():
    points = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    points[7] = points[3]
    pairs = all_pairs(points, points) + np.diag(np.full(23, np.inf))
    got = nearest_neighbour_distances(points, points, exclude_self=True)
    np.testing.assert_allclose(got, pairs.min(1), rtol=1e-12)
    assert got[3] == got[7] == 0 and np.delete(got, [3, 7]).min() > 0
    np.testing.assert_array_equal(nearest_neighbour_distances(points, points), np.zeros(23))


def test_an_exact_copy_far_from_the_origin_is_at_zero():
    # |q|^2 - 2 q.r + |r|^2 cancels here and would report a positive distance.
    references = np.random.default_rng(0).normal(size=(101, 61)) + 1e4
    np.testing.assert_array_equal(nearest_neighbour_distances(references[::7], references), 0)


@pytest.mark.parametrize(
    ("queries", "references", "exclude_self", "message"),
    [
        ((5, 3), (7, 2), False, r"queries \(5, 3\) and references \(7, 2\) differ in width"),
        ((5, 3), (7, 3), True, r"exclude_self needs queries \(5, 3\) .* \(7, 3\); pass the same"),
        ((5, 3), (0, 3), False, r"references \(0, 3\) leave no neighbour"),
        ((1, 3), (1, 3), True, r"references \(1, 3\) leave no neighbour .*exclude_self=True"),
    ],
)
def test_bad_points_are_named(queries, references, exclude_self, message):
    with pytest.raises(ValueError, match=rf"nearest_neighbour_distances: {message}"):
        # Unwrapped, as users run it: the suite's shape checks would come first.
        inspect.unwrap(nearest_neighbour_distances)(
            np.ones(queries), np.ones(references), exclude_self
        )
