"""What detectors by points share, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.models.detection.points import (
    HEAT_BIAS,
    PointHead,
    cells_of,
    finest_maps,
    ranked,
)


def test_points_on_the_lower_and_right_border_belong_to_the_last_cell():
    points = jnp.array([[0.0, 0.0], [39.5, 8.0], [40.0, 28.0], [7.0, 27.8]])
    cells, offsets = cells_of(points, (7, 10), 4)
    np.testing.assert_array_equal(cells, [[0, 0], [9, 2], [9, 6], [1, 6]])
    np.testing.assert_allclose(offsets, [[0, 0], [0.875, 0], [1, 1], [0.75, 0.95]], rtol=1e-5)


def test_heads_start_with_a_tenth_of_a_chance_everywhere():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7, 11)), jnp.float32)
    head = PointHead(3, width=13, bias=HEAT_BIAS, dtype=jnp.bfloat16)
    heat, variables = jax.jit(head.init_with_output)(jax.random.key(0), x)
    assert heat.dtype == jnp.float32
    np.testing.assert_allclose(jax.nn.sigmoid(heat), 0.1, atol=0.03)
    assert np.ptp(heat) > 0.01 and variables["params"]["hidden"]["kernel"].dtype == jnp.float32


def test_finest_maps_are_all_of_the_smallest_stride():
    assert finest_maps({"C2": 4, "C3": 8}) == (["C2"], 4)
    assert finest_maps({"P4": 16, "stack_0": 4, "stack_1": 4}) == (["stack_0", "stack_1"], 4)


def test_ranked_leaves_out_what_is_not_valid_and_empties_its_place():
    boxes = jnp.arange(20, dtype=jnp.float32).reshape(5, 4)
    scores, classes = jnp.array([0.2, 0.9, 0.0, 0.7, 0.4]), jnp.array([5, 6, 7, 8, 9])
    valid = jnp.array([True, False, True, True, False])
    found = ranked(boxes, scores, classes, valid, 4)
    np.testing.assert_array_equal(found.valid, [True, True, True, False])
    np.testing.assert_array_equal(found.classes, [8, 5, 7, -1])
    np.testing.assert_allclose(found.scores, [0.7, 0.2, 0, 0])
    np.testing.assert_array_equal(found.boxes, [*boxes[jnp.array([3, 0, 2])], np.zeros(4)])
    assert ranked(boxes, scores, classes, valid, 9).scores.shape == (5,)
