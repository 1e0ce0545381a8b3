"""Formats of boxes against their definitions, one by one in float64; bad boxes named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops import boxes as ops

RNG = np.random.default_rng(0)
LOW, SIZE = RNG.uniform(-5, 20, (2, 3, 2)), RNG.uniform(0, 9, (2, 3, 2))
XYXY = np.concatenate([LOW, LOW + SIZE], axis=-1).astype(np.float32)


def one_by_one(function, boxes):
    flat = [function(*box) for box in np.asarray(boxes, np.float64).reshape(-1, 4)]
    return np.array(flat).reshape(*boxes.shape[:-1], -1)


TO = {
    "cxcywh": lambda x1, y1, x2, y2: ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1),
    "xywh": lambda x1, y1, x2, y2: (x1, y1, x2 - x1, y2 - y1),
}
# What one unit of each number adds to each number of the other format.
SLOPES = {
    "cxcywh": [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [-1, 0, 1, 0], [0, -1, 0, 1]],
    "xywh": [[1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, -1, 0, 1]],
}


@pytest.mark.parametrize("name", ["cxcywh", "xywh"])
def test_formats_there_and_back(name):
    there, back = getattr(ops, f"xyxy_to_{name}"), getattr(ops, f"{name}_to_xyxy")

    @jax.jit
    def both(boxes):
        other = there(boxes)
        return other, back(other), jax.jacobian(there)(boxes[0, 0]), jax.jacobian(back)(other[0, 0])

    other, again, slopes, inverse = both(XYXY)
    np.testing.assert_allclose(other, one_by_one(TO[name], XYXY), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(again, XYXY, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(slopes, SLOPES[name])
    np.testing.assert_allclose(inverse, np.linalg.inv(np.array(SLOPES[name])), atol=1e-6)


def test_areas():
    boxes = np.concatenate([XYXY[0], [[3, 5, 3, 8], [4, 4, 2, 9], [4, 4, 2, 2]]]).astype(np.float32)
    area, slope = jax.jit(jax.vmap(jax.value_and_grad(ops.box_area)))(boxes)
    expected = one_by_one(lambda x1, y1, x2, y2: max(x2 - x1, 0) * max(y2 - y1, 0), boxes)
    np.testing.assert_allclose(area, expected[:, 0], rtol=1e-5)
    w, h = SIZE[0].T
    np.testing.assert_allclose(slope[:3], np.stack([-h, -w, h, w], axis=1), rtol=1e-5)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("size", [(11, 17), np.array([11.0, 17.0], np.float32), np.array([11, 17])])
def test_clipping(size):
    size = size if isinstance(size, tuple) else jnp.asarray(size)
    boxes = np.concatenate([XYXY[0], [[-9, -9, -2, -3], [-1, 5, 30, 30]]]).astype(np.float32)
    into = lambda v, end: min(max(v, 0), end)  # noqa: E731
    expected = one_by_one(
        lambda x1, y1, x2, y2: (into(x1, 17), into(y1, 11), into(x2, 17), into(y2, 11)), boxes
    )
    np.testing.assert_allclose(ops.clip_boxes(jnp.asarray(boxes), size), expected, rtol=1e-6)


def test_clipping_to_a_size_of_their_own_lets_gradients_through_inside():
    boxes = jnp.array([[[1.0, 2, 13, 30]], [[1, 2, 13, 30]]])
    sizes = jnp.array([[11.0, 17], [50, 12]])

    @jax.jit
    @jax.vmap
    def clipped(boxes, size):
        out, pull_back = jax.vjp(lambda boxes: ops.clip_boxes(boxes, size), boxes)
        return out, pull_back(jnp.ones_like(out))[0]

    out, slope = clipped(boxes, sizes)
    np.testing.assert_array_equal(out, [[[1, 2, 13, 11]], [[1, 2, 12, 30]]])
    np.testing.assert_array_equal(slope, [[[1, 1, 1, 0]], [[1, 1, 0, 1]]])


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("place", "box", "message"),
    [
        ((1, 0), (5, 5, 4, 9), r"boxes\[1, 0\] = \(5, 5, 4, 9\) has a negative size; .* xywh_to"),
        ((0, 1), (5, 5, 9, 4), r"boxes\[0, 1\] = \(5, 5, 9, 4\) has a negative size"),
        ((0, 2), (5, 5, np.nan, 9), r"boxes\[0, 2\] = \(5, 5, nan, 9\) is not finite"),
        ((0, 0), (5, 5, np.inf, 9), r"\(5, 5, inf, 9\) is not finite"),
        ((1, 2), (0, 0, 17, 11.5), r"\(0, 0, 17, 11.5\) leaves the image of 11 x 17 .* clip_boxes"),
        ((1, 1), (0, 0, 17.5, 11), "leaves the image"),
        ((1, 1), (-1, 0, 1, 1), "leaves the image"),
        ((1, 1), (0, -1, 1, 1), "leaves the image"),
    ],
)
def test_bad_boxes(convert, place, box, message):
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[1, 1] = (0, 0, 17, 11)  # the whole image
    ops.require_boxes("f", "boxes", convert(boxes), (11, 17))
    boxes[place] = box
    with pytest.raises(ValueError, match=f"^f: .*{message}"):
        ops.require_boxes("f", "boxes", convert(boxes), (11, 17))
    if "leaves" in message:
        ops.require_boxes("f", "boxes", convert(boxes))


def test_a_single_bad_box_and_boxes_while_tracing():
    with pytest.raises(ValueError, match=r"f: box = \(1, 2, 0, 4\) has a negative size"):
        ops.require_boxes("f", "box", jnp.array([1.0, 2, 0, 4]))
    jax.eval_shape(lambda boxes: ops.require_boxes("f", "boxes", boxes), jnp.full((2, 4), jnp.nan))


def test_a_box_has_four_numbers():
    """While tracing, too."""
    for shape in ((3, 5), (4, 2), ()):
        with pytest.raises(ValueError, match=r"f: boxes \(.*\) must be \(..., 4\), xyxy"):
            jax.eval_shape(lambda boxes: ops.require_boxes("f", "boxes", boxes), jnp.zeros(shape))
