"""Pairing off against SciPy, and against all ways there are where some pairs are forbidden."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment

from jaxmodels.ops.assignment import assign_one_to_one

assign = jax.jit(assign_one_to_one)


def total(costs, columns):
    """Sum of the costs paid, after a look at whether no column is taken twice."""
    rows = np.flatnonzero(np.asarray(columns) >= 0)
    taken = np.asarray(columns)[rows]
    assert len({*taken.tolist()}) == len(taken)
    return costs[rows, taken].sum(), len(taken)


NO = np.inf
# Two dear pairs instead of one forbidden and one that is cheap.
DEAR = np.array([(-9, 9, NO), (9, NO, NO), (NO, NO, 0), (NO, NO, NO)], np.float32)


def costs_of(elements):
    sizes = st.sampled_from([(5, 7), (7, 5), (6, 6), (1, 3)])
    return sizes.flatmap(lambda size: arrays.arrays(np.float32, size, elements=elements))


@settings(deadline=None, max_examples=80)
@given(costs=costs_of(st.integers(-9, 9) | st.floats(-1000, 1000, width=32)))
def test_equals_scipy(costs):
    """Ties, negative costs, more rows than columns and the reverse."""
    paid, pairs = total(costs, assign(costs))
    assert pairs == min(costs.shape)
    np.testing.assert_allclose(
        paid, costs[linear_sum_assignment(costs)].sum(), rtol=1e-5, atol=1e-2
    )


@settings(deadline=None, max_examples=40)
@given(costs=arrays.arrays(np.float32, (4, 3), elements=st.integers(-9, 9) | st.just(NO)))
@example(costs=DEAR)
def test_forbidden_pairs_are_left_out(costs):
    """Of all ways with as many pairs as are allowed, the cheapest."""
    best = (0, 0.0)
    for rows in itertools.permutations(range(4), 3):
        chosen = costs[list(rows), range(3)]
        paid = chosen[np.isfinite(chosen)]
        best = max(best, (len(paid), -paid.sum()))
    paid, pairs = total(costs, assign(costs))
    assert (pairs, -paid) == best


def test_padding_changes_nothing_and_vmaps():
    costs = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    padded = costs.copy()
    padded[..., 3:] = 4.0
    for found, each in zip(jax.jit(jax.vmap(assign_one_to_one))(padded), costs, strict=True):
        rows, columns = linear_sum_assignment(each[:, :3])
        np.testing.assert_array_equal(found[rows], columns)
        assert sorted(found.tolist()) == [-1, -1, 0, 1, 2, 3, 4]


def test_many():
    costs = np.random.default_rng(0).uniform(size=(61, 53)).astype(np.float32)
    paid, pairs = total(costs, assign(costs))
    assert pairs == 53
    np.testing.assert_allclose(paid, costs[linear_sum_assignment(costs)].sum(), rtol=1e-5)


def test_nothing_to_pair():
    assert assign_one_to_one(jnp.zeros((3, 0))).tolist() == [-1, -1, -1]
    assert assign_one_to_one(jnp.zeros((0, 3))).shape == (0,)


def test_bad_costs():
    costs = jnp.ones((3, 5)).at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"assign_one_to_one: costs\[1, 2\] = nan can be neither"):
        assign_one_to_one(costs)
    with pytest.raises(ValueError, match=r"costs\[1, 2\] = -inf .* finite number, or inf"):
        assign_one_to_one(costs.at[1, 2].set(-jnp.inf))
    # Compiled, such a pair is forbidden.
    found = assign(jnp.ones((1, 3)).at[0, :2].set(jnp.array([jnp.nan, -jnp.inf])))
    assert found.tolist() == [2]
