"""Coding of boxes against the papers' definitions, box by box, and torch's gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops import box_coding as ops

RNG = np.random.default_rng(0)


def draw(*shape):
    low = RNG.uniform(0, 60, (*shape, 2))
    return np.concatenate([low, low + RNG.uniform(2, 60, (*shape, 2))], axis=-1)


def each(function, *arrays):
    """A function of single boxes, on arrays that are broadcast; in torch's float64."""
    shape = np.broadcast_shapes(*(a.shape[:-1] for a in arrays))
    flat = [a.expand(*shape, a.shape[-1]).reshape(-1, a.shape[-1]) for a in arrays]
    out = [torch.stack(list(function(*row))) for row in zip(*flat, strict=True)]
    return torch.stack(out).reshape(*shape, -1)


def deltas_of(box, anchor, weights=(1, 1, 1, 1)):
    aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
    w, h = box[2] - box[0], box[3] - box[1]
    dx = weights[0] * (box[0] + 0.5 * w - anchor[0] - 0.5 * aw) / aw
    dy = weights[1] * (box[1] + 0.5 * h - anchor[1] - 0.5 * ah) / ah
    return dx, dy, weights[2] * torch.log(w / aw), weights[3] * torch.log(h / ah)


LARGEST = math.log(1000 / 16)


def box_of(deltas, anchor, weights=(1, 1, 1, 1), most=LARGEST):
    aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx, dy, dw, dh = (d / weight for d, weight in zip(deltas, weights, strict=True))
    x, y = dx * aw + anchor[0] + 0.5 * aw, dy * ah + anchor[1] + 0.5 * ah
    w, h = torch.exp(dw.clamp(max=most)) * aw, torch.exp(dh.clamp(max=most)) * ah
    return x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h


def check(ours, theirs, *arrays):
    """Values and gradients of every argument, compiled, in float64."""
    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = each(theirs, *leaves)
    cotangent = RNG.normal(size=expected.shape)
    gradients = torch.autograd.grad(expected, leaves, torch.tensor(cotangent))

    @jax.jit
    def both(*arrays):
        out, pull_back = jax.vjp(ours, *arrays)
        return out, *pull_back(cotangent)

    with jax.enable_x64(True):
        found = both(*arrays)
    for mine, wanted in zip(found, (expected, *gradients), strict=True):
        np.testing.assert_allclose(mine, wanted.detach(), rtol=1e-9, atol=1e-9)


def test_deltas_with_anchors_that_broadcast():
    weights = (10.0, 7.0, 5.0, 3.0)
    boxes, anchors = draw(5, 3), draw(5, 1)
    check(
        lambda b, a: ops.encode_deltas(b, a, weights=weights),
        lambda b, a: deltas_of(b, a, weights),
        boxes,
        anchors,
    )
    # Sizes up to e^6 times the anchor's, of which the bound leaves 62.5.
    deltas = RNG.normal(size=(5, 3, 4)) * np.array([10, 7, 10, 6])
    check(
        lambda d, a: ops.decode_deltas(d, a, weights=weights),
        lambda d, a: box_of(d, a, weights),
        deltas,
        anchors,
    )
    check(
        lambda d, a: ops.decode_deltas(d, a, max_log_ratio=0.5),
        lambda d, a: box_of(d, a, most=0.5),
        deltas,
        anchors,
    )


def test_distances():
    points, boxes = RNG.uniform(0, 60, (5, 1, 2)), draw(1, 3)
    check(
        ops.encode_distances,
        lambda p, b: (p[0] - b[0], p[1] - b[1], b[2] - p[0], b[3] - p[1]),
        points,
        boxes,
    )
    check(
        ops.decode_distances,
        lambda p, d: (p[0] - d[0], p[1] - d[1], p[0] + d[2], p[1] + d[3]),
        points,
        RNG.uniform(-5, 30, (5, 3, 4)),
    )


def test_cells_of_yolo_v2():
    cells, shapes = np.array([[[3, 1]], [[0, 5]]]), RNG.uniform(9, 40, (1, 3, 2))
    columns_rows = torch.tensor(cells[:, 0])

    def encoded(box, shape, cell):
        (w, h), x, y = shape, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        offsets = x / 13 - cell[0], y / 13 - cell[1]
        return *offsets, torch.log((box[2] - box[0]) / w), torch.log((box[3] - box[1]) / h)

    def decoded(raw, shape, cell):
        x, y = (13 * (torch.sigmoid(raw[i]) + cell[i]) for i in (0, 1))
        w, h = (shape[i] * torch.exp(raw[2 + i].clamp(max=LARGEST)) for i in (0, 1))
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2

    for ours, theirs, values in (
        (ops.encode_cells, encoded, draw(3)[None]),
        (ops.decode_cells, decoded, RNG.normal(0, 3, (1, 3, 4))),
    ):
        for i in range(2):
            cell = columns_rows[i]
            check(
                lambda v, s, f=ours, i=i: f(v, jnp.asarray(cells[i])[None], s, 13),
                lambda v, s, f=theirs, c=cell: f(v, s, c),
                values,
                shapes,
            )


def test_cells_of_yolo_v1():
    grid, size, cell = (5, 7), (130, 140), np.array([[2, 3]])

    def encoded(box):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        roots = torch.sqrt((box[2] - box[0]) / 140), torch.sqrt((box[3] - box[1]) / 130)
        return 7 * x / 140 - 2, 5 * y / 130 - 3, *roots

    def decoded(raw):
        x, y, w, h = (raw[0] + 2) * 20, (raw[1] + 3) * 26, raw[2] ** 2 * 140, raw[3] ** 2 * 130
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2

    cell = jnp.asarray(cell)
    check(lambda b: ops.encode_grid_boxes(b, cell, grid, size), encoded, draw(3))
    check(lambda r: ops.decode_grid_boxes(r, cell, grid, size), decoded, RNG.normal(size=(3, 4)))


def test_decoding_undoes_encoding_and_vmaps():
    boxes, anchors = (jnp.asarray(draw(3, 5), jnp.float32) for _ in range(2))
    points, cells = anchors[..., :2], (anchors[..., :2] / 8).astype(jnp.int32)
    shapes = anchors[..., 2:]

    @jax.jit
    @jax.vmap
    def again(boxes, anchors, points, cells, shapes):
        deltas = ops.encode_deltas(boxes, anchors, weights=(10, 10, 5, 5))
        inside = ops.encode_cells(boxes, cells, shapes, 8)
        # The offset in the cell, which the sigmoid is to give.
        chance = jnp.clip(inside[..., :2], 0.01, 0.99)
        raw = jnp.concatenate([jnp.log(chance / (1 - chance)), inside[..., 2:]], axis=-1)
        grid = ops.encode_grid_boxes(boxes, cells, (5, 7), (130, 140))
        return (
            ops.decode_deltas(deltas, anchors, weights=(10, 10, 5, 5)),
            ops.decode_distances(points, ops.encode_distances(points, boxes)),
            ops.decode_grid_boxes(grid, cells, (5, 7), (130, 140)),
            ops.decode_cells(raw, cells, shapes, 8),
        )

    *exact, in_cell = again(boxes, anchors, points, cells, shapes)
    for found in exact:
        np.testing.assert_allclose(found, boxes, rtol=1e-4, atol=1e-3)
    sizes = in_cell[..., 2:] - in_cell[..., :2]
    np.testing.assert_allclose(sizes, boxes[..., 2:] - boxes[..., :2], rtol=1e-4, atol=1e-3)


def test_empty_boxes_and_huge_predictions_keep_gradients_finite():
    boxes = jnp.array([[0.0, 0, 0, 0], [3, 4, 3, 9], [3, 4, 8, 9]])
    raw = jnp.array([[0.0, 0, 1e3, 200], [-1e3, 1e3, -1e3, 0], [0, 0, 0, 0]])
    cells, shapes = jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2))
    coders = {
        "encode_deltas": (ops.encode_deltas, boxes, boxes[::-1]),
        "decode_deltas": (ops.decode_deltas, raw, boxes),
        "encode_cells": (lambda b, s: ops.encode_cells(b, cells, s, 8), boxes, shapes),
        "decode_cells": (lambda b, s: ops.decode_cells(b, cells, s, 8), raw, shapes),
        "encode_grid": (lambda b: ops.encode_grid_boxes(b, cells, (2, 3), (20, 30)), boxes),
        "decode_grid": (lambda b: ops.decode_grid_boxes(b, cells, (2, 3), (20, 30)), raw),
    }

    @jax.jit
    def slopes(arguments):
        out = {}
        for name, (function, *_) in coders.items():
            value, pull_back = jax.vjp(function, *arguments[name])
            out[name] = (value, *pull_back(jnp.ones_like(value)))
        return out

    for name, parts in slopes({name: rest for name, (_, *rest) in coders.items()}).items():
        for part in parts:
            assert np.isfinite(part).all(), name


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5.0, 5, 4, 9), r"= \(5, 5, 4, 9\) has a negative size"),
        ((5.0, 5, math.nan, 9), r"= \(5, 5, nan, 9\) is not finite"),
    ],
)
def test_bad_boxes(box, message):
    bad, good = jnp.array([[0.0, 0, 1, 1], box]), jnp.array([[0.0, 0, 1, 1], [2, 2, 3, 3]])
    cells, pairs = jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 2))
    calls = {
        r"encode_deltas: boxes\[1\] ": lambda: ops.encode_deltas(bad, good),
        r"encode_deltas: anchors\[1\] ": lambda: ops.encode_deltas(good, bad),
        r"encode_distances: boxes\[1\] ": lambda: ops.encode_distances(pairs, bad),
        r"encode_cells: boxes\[1\] ": lambda: ops.encode_cells(bad, cells, pairs, 8),
        r"encode_grid_boxes: boxes\[1\] ": lambda: ops.encode_grid_boxes(
            bad, cells, (2, 2), (16, 16)
        ),
    }
    for start, call in calls.items():
        with pytest.raises(ValueError, match=start + message):
            call()


def test_a_box_outside_the_image_has_no_place_in_its_grid():
    box = jnp.array([[3.0, 3, 20, 9]])
    with pytest.raises(ValueError, match=r"encode_grid_boxes: .* leaves the image of 16 x 19 pix"):
        ops.encode_grid_boxes(box, jnp.zeros((1, 2), jnp.int32), (2, 2), (16, 19))
