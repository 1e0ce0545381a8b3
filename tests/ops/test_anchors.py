"""Anchors against torchvision's and FCOS's definitions, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.anchors import anchor_shapes, grid_anchors, grid_points


def test_shapes_have_the_area_and_the_ratio():
    sizes, ratios = (32.0, 64.0, 13), (0.5, 1, 3.0)
    shapes = np.asarray(anchor_shapes(sizes, ratios), np.float64)
    pairs = [(size, ratio) for ratio in ratios for size in sizes]
    for (w, h), (size, ratio) in zip(shapes, pairs, strict=True):
        np.testing.assert_allclose([w * h, h / w], [size**2, ratio], rtol=1e-6)


@pytest.mark.parametrize("centred_in_cell", [False, True])
def test_a_grid_of_anchors(centred_in_cell):
    """The corners of size 32 are those that torchvision prints; the grid is by its rule."""
    shapes = 2 * jnp.round(anchor_shapes((32,), (0.5, 1, 2)) / 2)
    base = np.array([(-23, -11, 23, 11), (-16, -16, 16, 16), (-11, -23, 11, 23)])
    found = jax.jit(lambda: grid_anchors(shapes, (3, 5), 7, centred_in_cell=centred_in_cell))()
    assert found.shape == (3, 5, 3, 4)
    for y, x, a in np.ndindex(3, 5, 3):
        shift = 7 * np.array([x, y, x, y]) + 3.5 * centred_in_cell
        np.testing.assert_array_equal(found[y, x, a], base[a] + shift)


def test_points_are_the_centres_of_cells():
    """FCOS: floor(s / 2) + x s for even strides."""
    points = grid_points((3, 5), 8)
    assert points.shape == (3, 5, 2)
    for y, x in np.ndindex(3, 5):
        np.testing.assert_array_equal(points[y, x], [8 // 2 + x * 8, 8 // 2 + y * 8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: anchor_shapes((32.0, 0.0), (1.0,)), r"anchor_shapes: sizes=\(32.0, 0.0\) must"),
        (lambda: anchor_shapes((32.0,), (-1.0,)), r"anchor_shapes: ratios=\(-1.0,\) must be pos"),
        (lambda: anchor_shapes((), (1.0,)), r"anchor_shapes: sizes=\(\) must be positive"),
        (lambda: grid_points((3, 0), 8), r"grid_points: grid=\(3, 0\) and stride=8 must be pos"),
        (
            lambda: grid_anchors(jnp.ones((1, 2)), (3, 5), 0, centred_in_cell=True),
            r"grid_anchors: grid=\(3, 5\) and stride=0 must be positive",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
