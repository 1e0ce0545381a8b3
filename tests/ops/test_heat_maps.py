"""Heat maps against their definition, cell by cell; the radius against a search for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxmodels.ops.heat_maps import gaussian_radius, heat_map_peaks, splat_gaussians

SHAPE = (7, 11, 3)


def overlap(a, b):
    wide, high = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(wide, 0) * max(high, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def searched_radius(height, width, least):
    """The largest r for which every box with both corners off by r fits, by bisection."""
    truth = (0, 0, width, height)

    def fits(r):
        moved, larger = (r, r, width + r, height + r), (-r, -r, width + r, height + r)
        smaller = (r, r, width - r, height - r)
        if min(width, height) <= 2 * r:
            return False
        return all(overlap(truth, box) >= least for box in (moved, larger, smaller))

    low, high = 0.0, max(height, width)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def test_radius_is_the_largest_that_fits():
    """Of the three ways to be off, for square, oblong and very oblong boxes."""
    heights, widths = np.array([4, 13, 1, 90, 300, 7]), np.array([4, 5, 200, 90, 2, 11])
    rows, columns = jnp.asarray(heights, jnp.float32), jnp.asarray(widths, jnp.float32)
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    radii = jax.jit(lambda h, w: [gaussian_radius(h, w, o) for o in levels])(rows, columns)
    for found, least in zip(radii, levels, strict=True):
        expected = [searched_radius(h, w, least) for h, w in zip(heights, widths, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(gaussian_radius(rows, columns), radii[3])


def test_radius_of_an_empty_box():
    heights, widths = jnp.array([0.0, 0.0, 5.0]), jnp.array([0.0, 5.0, 0.0])
    both = jax.jit(jax.vmap(jax.value_and_grad(gaussian_radius, (0, 1))))
    value, slopes = both(heights, widths)
    np.testing.assert_array_equal(value, 0)
    assert all(np.isfinite(slope).all() for slope in slopes)


def splat_by_definition(centres, radii, labels, valid):
    heat = np.zeros(SHAPE)
    for (x, y), radius, label, there in zip(centres, radii, labels, valid, strict=True):
        r = int(radius)
        for row, column in np.ndindex(SHAPE[:2]):
            if there and abs(row - y) <= r and abs(column - x) <= r:
                squares = (row - y) ** 2 + (column - x) ** 2
                value = np.exp(-squares / (2 * ((2 * r + 1) / 6) ** 2))
                heat[row, column, label] = max(heat[row, column, label], value)
    return heat


splat = jax.jit(splat_gaussians, static_argnums=4)
places = st.tuples(st.integers(0, 10), st.integers(0, 6))


@settings(deadline=None, max_examples=60)
@given(
    centres=st.lists(places, min_size=5, max_size=5),
    radii=arrays.arrays(np.float32, 5, elements=st.floats(0, 9, width=32)),
    labels=arrays.arrays(np.int32, 5, elements=st.integers(0, 2)),
    valid=arrays.arrays(bool, 5),
)
def test_gaussians(centres, radii, labels, valid):
    centres = np.array(centres, np.int32)
    # Padding may hold anything.
    given_labels = np.where(valid, labels, -1)
    given_centres = np.where(valid[:, None], centres, 1000)
    heat = np.asarray(splat(given_centres, radii, given_labels, valid, SHAPE))
    np.testing.assert_allclose(
        heat, splat_by_definition(centres, radii, labels, valid), rtol=1e-5, atol=1e-7
    )
    x, y = centres[valid].T
    assert (heat[y, x, labels[valid]] == 1).all()


def test_gaussians_of_a_batch_without_and_with_objects():
    centres, radii = jnp.array([[[3, 2]], [[3, 2]]]), jnp.array([[1.0], [1.0]])
    labels, valid = jnp.array([[-1], [2]]), jnp.array([[False], [True]])
    heat = jax.vmap(lambda *of_image: splat_gaussians(*of_image, SHAPE))
    found = jax.jit(heat)(centres, radii, labels, valid)
    assert not found[0].any()
    np.testing.assert_allclose(
        found[1], splat_by_definition([(3, 2)], [1], [2], [True]), rtol=1e-5, atol=1e-7
    )


@jax.jit
def peaks(heat):
    return {(count, size): heat_map_peaks(heat, count, size=size) for count, size in READ}


READ = ((6, 3), (2, 5), (231, 3), (9, 1))


@settings(deadline=None, max_examples=40)
@given(heat=arrays.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])))
def test_peaks(heat):
    """With many equal neighbours, which are peaks both."""
    for (count, size), found in jax.device_get(peaks(heat)).items():
        expected, half = [], size // 2
        for y, x, k in np.ndindex(SHAPE):
            around = heat[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1, k]
            if heat[y, x, k] and heat[y, x, k] == around.max():
                expected.append((-heat[y, x, k], (y * SHAPE[1] + x) * SHAPE[2] + k, (k, y, x)))
        expected = sorted(expected)[:count]
        scores, *where = found
        assert scores.tolist() == [-e[0] for e in expected] + [0] * (count - len(expected))
        held = len(expected)
        assert [*zip(*(part[:held].tolist() for part in where), strict=True)] == [
            e[2] for e in expected
        ]


def test_peaks_pass_gradients_to_their_cells():
    heat = jnp.zeros(SHAPE).at[2, 3, 1].set(0.5).at[2, 4, 1].set(0.25).at[5, 9, 0].set(0.75)
    slope = jax.jit(jax.grad(lambda heat: heat_map_peaks(heat, 2)[0] @ jnp.array([3.0, 5.0])))(heat)
    np.testing.assert_array_equal(slope, jnp.zeros(SHAPE).at[5, 9, 0].set(3).at[2, 3, 1].set(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 3]}, r"labels holds 3, outside \[0, 2\]"),
        ({"labels": [0, -1]}, r"labels holds -1, outside \[0, 2\]"),
        ({"centres": [[0, 0], [11, 0]]}, r"centres \(x\) holds 11, outside \[0, 10\]"),
        ({"centres": [[0, 0], [0, 7]]}, r"centres \(y\) holds 7, outside \[0, 6\]"),
        ({"centres": [[0, 0], [0, -1]]}, r"centres \(y\) holds -1"),
        ({"radii": [1.0, -2.0]}, "radii holds -2, outside"),
        ({"radii": [1.0, float("nan")]}, "radii holds nan, outside"),
        ({"radii": [1.0]}, r"radii \(1,\) must be \(N,\) = \(2,\)"),
        ({"labels": [1, 1, 1]}, r"labels \(3,\) must be \(N,\) = \(2,\)"),
        ({"valid": [True]}, r"valid \(1,\) must be \(N,\) = \(2,\)"),
    ],
)
def test_bad_objects(change, message):
    arguments = {
        "centres": [[0, 0], [1, 1]],
        "radii": [1.0, 1.0],
        "labels": [0, 1],
        "valid": [True, True],
    }
    arguments = {name: jnp.array(value) for name, value in (arguments | change).items()}
    with pytest.raises(ValueError, match=f"splat_gaussians: {message}"):
        splat_gaussians(**arguments, shape=SHAPE)


def test_bad_radii_and_peaks():
    one, heat = jnp.ones(1), jnp.zeros(SHAPE)
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"gaussian_radius: min_overlap={bad} must be between"):
            gaussian_radius(one, one, bad)
    with pytest.raises(ValueError, match="gaussian_radius: heights holds -1"):
        gaussian_radius(-one, one)
    with pytest.raises(ValueError, match="gaussian_radius: widths holds nan"):
        gaussian_radius(one, one * jnp.nan)
    with pytest.raises(ValueError, match="heat_map_peaks: size=4 must be odd"):
        heat_map_peaks(heat, 5, size=4)
    with pytest.raises(ValueError, match="heat_map_peaks: count=232 must be from 1 to the 231 cel"):
        heat_map_peaks(heat, 232)
