"""Matching against the papers' rules, anchor by anchor in NumPy; torchvision's ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxmodels.ops.matching import centre_sampling, match_by_threshold

ANCHORS, OBJECTS = 13, 5


def by_threshold(overlaps, valid, positive, negative, rescue):
    """torchvision's Matcher, object by object, without the objects that are not there."""
    there = np.flatnonzero(valid)
    out = np.full(len(overlaps), -1)
    if not len(there):
        return out
    own = [max(there, key=lambda n, row=row: (row[n], -n)) for row in overlaps]
    for a, row in enumerate(overlaps):
        if row[own[a]] >= positive:
            out[a] = own[a]
        elif row[own[a]] >= negative:
            out[a] = -2
    for n in there if rescue else ():
        best = max(overlaps[:, n])
        for a in range(len(overlaps)):
            if best > 0 and overlaps[a, n] == best:
                out[a] = own[a]
    return out


# Eighths, so that many are equal to each other and to the thresholds.
eighths = arrays.arrays(np.int32, (ANCHORS, OBJECTS), elements=st.integers(0, 8))
taken = arrays.arrays(bool, OBJECTS)


@jax.jit
def matched(overlaps, valid):
    return {
        (positive, negative, rescue): match_by_threshold(
            overlaps, valid, positive=positive, negative=negative, rescue=rescue
        )
        for positive, negative in ((0.75, 0.25), (0.5, 0.5), (1.0, 0.0))
        for rescue in (True, False)
    }


@settings(deadline=None, max_examples=100)
@given(overlaps=eighths, valid=taken)
def test_thresholds_and_rescue(overlaps, valid):
    overlaps = (overlaps / 8).astype(np.float32)
    for options, found in matched(overlaps, valid).items():
        np.testing.assert_array_equal(found, by_threshold(overlaps, valid, *options), str(options))


def test_a_rescued_anchor_may_go_to_another_object():
    """As in torchvision: the best anchor of object 1 overlaps object 0 more."""
    overlaps = jnp.array([[0.8, 0.6], [0.1, 0.2], [0.0, 0.0]])
    found = match_by_threshold(overlaps, jnp.array([True, True]), positive=0.7, negative=0.3)
    assert found.tolist() == [0, -1, -1]
    overlaps = overlaps.at[0, 1].set(0.1)
    found = match_by_threshold(overlaps, jnp.array([True, True]), positive=0.7, negative=0.3)
    assert found.tolist() == [0, 1, -1]


def test_images_without_objects_and_vmap():
    overlaps = jnp.array([[[0.8], [0.5]], [[0.8], [0.1]]])
    valid = jnp.array([[True], [False]])
    found = jax.vmap(lambda o, v: match_by_threshold(o, v, positive=0.7, negative=0.3))
    assert found(overlaps, valid).tolist() == [[0, -2], [-1, -1]]
    none = match_by_threshold(jnp.zeros((3, 0)), jnp.zeros(0, bool), positive=0.7, negative=0.3)
    assert none.tolist() == [-1, -1, -1]


def by_centres(points, boxes, valid, strides, ranges, radius):
    """FCOS, in the words of the paper."""
    out = []
    for (x, y), stride, (low, high) in zip(points, strides, ranges, strict=True):
        choices = []
        for n, (x1, y1, x2, y2) in enumerate(boxes):
            left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
            inside = left > 0 and top > 0 and right > 0 and bottom > 0
            if radius:
                cx, cy, reach = (x1 + x2) / 2, (y1 + y2) / 2, radius * stride
                inside &= cx - reach < x < cx + reach and cy - reach < y < cy + reach
            negative = max(left, top, right, bottom) > high or max(left, top, right, bottom) < low
            if valid[n] and inside and not negative:
                choices.append(((x2 - x1) * (y2 - y1), n))
        out.append(min(choices)[1] if choices else -1)
    return np.array(out)


# Two levels of a pyramid over 16 x 24 pixels.
GRIDS = {4: (4, 6), 8: (2, 3)}
POINTS = np.array(
    [((x + 0.5) * s, (y + 0.5) * s) for s, grid in GRIDS.items() for y, x in np.ndindex(*grid)]
)
STRIDES = np.repeat([4.0, 8.0], [24, 6])
RANGES = np.repeat([[0.0, 6.0], [6.0, np.inf]], [24, 6], axis=0)


@jax.jit
def sampled(boxes, valid):
    return {
        radius: centre_sampling(
            jnp.asarray(POINTS, jnp.float32),
            boxes,
            valid,
            strides=jnp.asarray(STRIDES, jnp.float32),
            size_ranges=jnp.asarray(RANGES, jnp.float32),
            radius=radius or None,
        )
        for radius in (0, 0.75, 1.5)
    }


sides = st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted)


@settings(deadline=None, max_examples=100)
@given(boxes=st.lists(st.tuples(sides, sides), min_size=OBJECTS, max_size=OBJECTS), valid=taken)
def test_centres(boxes, valid):
    """Whole numbers, so that points lie on sides, sizes on bounds, and areas are equal."""
    boxes = np.array([(x1, y1, x2, y2) for (x1, x2), (y1, y2) in boxes], np.float32)
    for radius, found in sampled(boxes, valid).items():
        expected = by_centres(POINTS, boxes, valid, STRIDES, RANGES, radius)
        np.testing.assert_array_equal(found, expected, f"radius {radius}")


def test_no_places_for_objects():
    points, strides, ranges = jnp.ones((3, 2)), jnp.ones(3), jnp.ones((3, 2))
    options = {"strides": strides, "size_ranges": ranges}
    found = centre_sampling(points, jnp.zeros((0, 4)), jnp.zeros(0, bool), **options)
    assert found.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": 0.3, "negative": 0.7}, r"positive=0.3 and negative=0.7 must be in order"),
        ({"positive": 1.5}, "positive=1.5 .* <= 1"),
        ({"negative": -0.5}, "negative=-0.5 must be in order, 0 <= "),
        ({"valid": jnp.ones(3, bool)}, r"valid \(3,\) must be \(N,\) = \(2,\)"),
    ],
)
def test_bad_thresholds(change, message):
    arguments = {"valid": jnp.ones(2, bool), "positive": 0.7, "negative": 0.3} | change
    with pytest.raises(ValueError, match=f"match_by_threshold: .*{message}"):
        match_by_threshold(jnp.zeros((5, 2)), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius=0.0 must be positive, or None"),
        ({"valid": jnp.ones(3, bool)}, r"valid \(3,\) must be \(N,\) = \(2,\)"),
        ({"strides": jnp.ones((5, 1))}, r"strides \(5, 1\) must be \(A,\) = \(5,\)"),
        ({"size_ranges": jnp.ones((2, 2))}, r"size_ranges \(2, 2\) must be \(A, 2\) = \(5, 2\)"),
    ],
)
def test_bad_levels(change, message):
    arguments = {
        "valid": jnp.ones(2, bool),
        "strides": jnp.ones(5),
        "size_ranges": jnp.ones((5, 2)),
    }
    with pytest.raises(ValueError, match=f"centre_sampling: .*{message}"):
        centre_sampling(jnp.zeros((5, 2)), jnp.zeros((2, 4)), **arguments | change)


def test_bad_boxes():
    boxes = jnp.array([[0.0, 0, 4, 4], [3, 3, 1, 9]])
    with pytest.raises(ValueError, match=r"centre_sampling: boxes\[1\] .* has a negative size"):
        centre_sampling(
            jnp.zeros((5, 2)),
            boxes,
            jnp.ones(2, bool),
            strides=jnp.ones(5),
            size_ranges=jnp.ones((5, 2)),
        )
