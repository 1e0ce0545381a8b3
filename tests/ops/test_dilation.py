"""Dilation schedules: the paper's examples, brute force, and gradients of real convolutions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmodels.ops.convolution import convolution
from jaxmodels.ops.dilation import covered_offsets, hybrid_dilations, meets_hybrid_condition


@given(
    kernel_size=st.sampled_from([1, 3, 5]),
    dilations=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_offsets_by_brute_force(kernel_size, dilations):
    taps = range(-(kernel_size // 2), kernel_size // 2 + 1)
    expected = {
        sum(d * j for d, j in zip(dilations, places, strict=True))
        for places in itertools.product(taps, repeat=len(dilations))
    }
    assert covered_offsets(kernel_size, dilations).tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("dilations", "holds"),
    [
        ((1, 2, 5), True),  # the paper's good example
        ((1, 2, 9), False),  # and its bad one
        ((2, 2, 2), False),  # figure 2, top
        ((1, 2, 3), True),  # figure 2, bottom
        ((2, 4, 8), False),
        ((3,), False),
        ((1,), True),
    ],
)
def test_condition_on_the_examples_of_the_paper(dilations, holds):
    assert meets_hybrid_condition(3, dilations) == holds
    offsets = covered_offsets(3, dilations)
    assert (len(offsets) == 1 + 2 * sum(dilations)) == holds


def test_common_divisor_grids_although_the_bound_holds():
    assert not meets_hybrid_condition(5, (2, 4, 8))
    assert (covered_offsets(5, (2, 4, 8)) % 2 == 0).all()


def reads(dilations):
    """Pixels with an influence on the centre, from a stack of convolutions of ones."""
    reach = sum(dilations)
    image = jnp.zeros((1, 2 * reach + 1, 2 * reach + 1, 1))

    def centre(x):
        for dilation in dilations:
            x = convolution(x, jnp.ones((3, 3, 1, 1)), padding=dilation, dilation=dilation)
        return x[0, reach, reach, 0]

    return np.asarray(jax.jit(jax.grad(centre))(image)[0, :, :, 0]) > 0


@pytest.mark.parametrize(("depth", "rate"), [(3, 2), (5, 2), (3, 4)])
def test_hybrid_reads_every_pixel_where_plain_grids(depth, rate):
    plain, hybrid = (rate,) * depth, hybrid_dilations(depth, rate)
    seen = reads(hybrid)
    grid = reads(plain)
    assert seen.shape == grid.shape  # equally far
    assert seen.all()
    assert not grid[1::rate].any() and not grid[:, 1::rate].any()
    for dilations, pixels in ((plain, grid), (hybrid, seen)):
        line = np.zeros(len(pixels), bool)
        line[covered_offsets(3, dilations) + sum(dilations)] = True
        np.testing.assert_array_equal(pixels, line[:, None] & line[None, :])


def test_schedules():
    assert hybrid_dilations(3, 2) == (1, 2, 3)
    assert hybrid_dilations(3, 4) == (1, 3, 8)
    assert hybrid_dilations(4, 1) == (1, 1, 1, 1)


@given(depth=st.integers(1, 9), rate=st.integers(1, 20), kernel_size=st.sampled_from([3, 5, 7]))
def test_every_schedule_keeps_its_promises(depth, rate, kernel_size):
    possible = rate * depth <= sum(kernel_size**layer for layer in range(depth))
    if not possible:
        with pytest.raises(ValueError, match="the largest rate is"):
            hybrid_dilations(depth, rate, kernel_size)
        return
    schedule = hybrid_dilations(depth, rate, kernel_size)
    assert len(schedule) == depth and sum(schedule) == depth * rate
    assert list(schedule) == sorted(schedule)
    assert kernel_size > 3 or meets_hybrid_condition(kernel_size, schedule)
    assert len(covered_offsets(kernel_size, schedule)) == 1 + (kernel_size - 1) * sum(schedule)


def test_bad_input():
    with pytest.raises(ValueError, match="covered_offsets: kernel_size=4 must be odd"):
        covered_offsets(4, (1, 2))
    with pytest.raises(ValueError, match=r"meets_hybrid_condition: \(1, 0\) must not"):
        meets_hybrid_condition(3, (1, 0))
    with pytest.raises(ValueError, match=r"covered_offsets: \(\) must not be empty"):
        covered_offsets(3, ())
    with pytest.raises(ValueError, match=r"depth=2 .* rate=3 .* largest rate is 2"):
        hybrid_dilations(2, 3)
    with pytest.raises(ValueError, match="hybrid_dilations"):
        hybrid_dilations(0, 3)
