"""Overlaps of shapes and their clusters against loops of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.shape_clusters import cluster_shapes, shape_iou


def overlap(a, b):
    """Of the two boxes around the origin, by their corners."""
    shared = 1.0
    for p, q in zip(a, b, strict=True):
        shared *= min(p / 2, q / 2) - max(-p / 2, -q / 2)
    return shared / (a[0] * a[1] + b[0] * b[1] - shared)


def overlaps(shapes, others):
    return np.array([[overlap(a, b) for b in others] for a in np.asarray(shapes, np.float64)])


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_shape_iou_is_that_of_centred_boxes(seed):
    rng = np.random.default_rng(seed)
    shapes, others = rng.uniform(0.1, 50, (7, 2)), rng.uniform(0.1, 50, (5, 2))
    found = jax.jit(shape_iou)(jnp.float32(shapes), jnp.float32(others))
    np.testing.assert_allclose(found, overlaps(shapes, others), rtol=1e-5)


def test_shapes_without_area_overlap_nothing():
    found = shape_iou(jnp.zeros((1, 2)), jnp.array([[0.0, 3.0], [2.0, 2.0]]))
    np.testing.assert_array_equal(found, [[0, 0]])


cluster = jax.jit(cluster_shapes, static_argnums=2)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_cluster_is_the_mean_of_the_shapes_it_overlaps_most(seed):
    rng = np.random.default_rng(seed)
    shapes = np.exp(rng.normal(3, 1, (33, 2))).astype(np.float32)
    found = np.asarray(cluster(jax.random.key(seed), jnp.asarray(shapes), 3), np.float64)
    assert (np.diff(found.prod(axis=1)) >= 0).all()
    member = overlaps(shapes, found).argmax(axis=1)
    for i in range(3):
        np.testing.assert_allclose(found[i], shapes[member == i].mean(axis=0), rtol=1e-4)


def test_finds_the_shapes_that_there_are():
    centres = np.array([[4, 9], [21, 10], [30, 70.0]])
    noise = np.random.default_rng(0).uniform(0.97, 1.03, (3, 11, 2))
    shapes = jnp.float32(centres[:, None] * noise)
    for seed in range(7):
        found = cluster(jax.random.key(seed), shapes.reshape(33, 2), 3)
        np.testing.assert_allclose(found, shapes.mean(axis=1), rtol=1e-5)


def test_fewer_different_shapes_than_anchors():
    found = cluster(jax.random.key(0), jnp.full((33, 2), 3.0), 3)
    np.testing.assert_allclose(found, np.full((3, 2), 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "count", "message"),
    [
        (np.ones((4, 2)), 5, "cluster_shapes: count=5 is not .* the number of shapes, 4"),
        (np.ones((4, 2)), 0, "cluster_shapes: count=0 is not between"),
        (np.array([[3, 4], [0, 2.0]]), 1, r"cluster_shapes: shapes holds 0, outside \(0, inf\]"),
        (np.array([[3, 4], [np.nan, 2]]), 1, "cluster_shapes: shapes holds nan"),
    ],
)  # fmt: skip
def test_bad_input(shapes, count, message):
    with pytest.raises(ValueError, match=message):
        cluster_shapes(jax.random.key(0), jnp.float32(shapes), count)
