"""Overlaps against counted pixels, pycocotools, and the papers' formulas in torch."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from jaxmodels.ops import box_overlaps as ops

KINDS = ("iou", "generalized_iou", "distance_iou", "complete_iou")


def formula(kind, a, b):
    """In torch, for boxes of positive size."""
    (ax, ay, ar, ab), (bx, by, br, bb) = a.unbind(-1), b.unbind(-1)
    zero = torch.zeros_like(ax)
    wide = torch.maximum(torch.minimum(ar, br) - torch.maximum(ax, bx), zero)
    high = torch.maximum(torch.minimum(ab, bb) - torch.maximum(ay, by), zero)
    shared = wide * high
    union = (ar - ax) * (ab - ay) + (br - bx) * (bb - by) - shared
    iou = shared / union
    around_w = torch.maximum(ar, br) - torch.minimum(ax, bx)
    around_h = torch.maximum(ab, bb) - torch.minimum(ay, by)
    if kind == "iou":
        return iou
    if kind == "generalized_iou":
        return iou - 1 + union / (around_w * around_h)
    apart = ((ax + ar) / 2 - (bx + br) / 2) ** 2 + ((ay + ab) / 2 - (by + bb) / 2) ** 2
    diou = iou - apart / (around_w**2 + around_h**2)
    if kind == "distance_iou":
        return diou
    angles = torch.atan((ar - ax) / (ab - ay)) - torch.atan((br - bx) / (bb - by))
    v = 4 / math.pi**2 * angles**2
    return diou - (v / (1 - iou + v)).detach() * v


def draw(seed, count):
    """Boxes, of which many overlap and some lie in others; no two have a side in common."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 10, (count, 2))
    return np.concatenate([low, low + rng.uniform(0.5, 9, (count, 2))], axis=-1)


@jax.jit
def all_kinds(a, b, cotangents):
    """Values and gradients, for all kinds."""
    out = {}
    for kind, cotangent in zip(KINDS, cotangents, strict=True):
        value, pull_back = jax.vjp(getattr(ops, kind), a, b)
        out[kind] = (value, *pull_back(cotangent))
    return out


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_equal_the_formulas_in_values_and_gradients(seed):
    a, b = draw(seed, 13)[:, None], draw(seed + 1, 7)[None]
    a, b = (np.ascontiguousarray(np.broadcast_to(v, (13, 7, 4))) for v in (a, b))
    cotangents = np.random.default_rng(seed).normal(size=(4, 13, 7))
    with jax.enable_x64(True):
        found = all_kinds(a, b, cotangents)
    for kind, cotangent in zip(KINDS, cotangents, strict=True):
        leaves = [torch.tensor(v, requires_grad=True) for v in (a, b)]
        value = formula(kind, *leaves)
        value.backward(torch.tensor(cotangent))
        expected = (value.detach(), *(leaf.grad for leaf in leaves))
        for mine, theirs in zip(found[kind], expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9, err_msg=kind)


whole = st.tuples(*[st.integers(0, 7)] * 4)


@jax.jit
def pairwise(a, b):
    around = ops.generalized_iou(a[:, None], b[None])
    return ops.pairwise_iou(a, b), ops.pairwise_intersection_over_area(a, b), around


@settings(deadline=None, max_examples=60)
@given(a=st.lists(whole, min_size=5, max_size=5), b=st.lists(whole, min_size=3, max_size=3))
def test_equal_counted_pixels(a, b):
    """Whole numbers, so that a box is a set of pixels: touching, nested, equal, empty or none."""

    def pixels(box):
        return {*itertools.product(range(box[0], box[2]), range(box[1], box[3]))}

    def share(part, of):
        return part / of if of else 0

    iou, over_area, generalized = pairwise(np.array(a, np.float32), np.array(b, np.float32))
    for (n, one), (m, other) in itertools.product(enumerate(a), enumerate(b)):
        mine, theirs = pixels(one), pixels(other)
        shared, union = len(mine & theirs), len(mine | theirs)
        np.testing.assert_allclose(iou[n, m], share(shared, union), rtol=1e-6)
        np.testing.assert_allclose(over_area[n, m], share(shared, len(mine)), rtol=1e-6)
        if mine and theirs:
            around = len(pixels([*map(min, one[:2], other[:2]), *map(max, one[2:], other[2:])]))
            expected = share(shared, union) - (around - union) / around
            np.testing.assert_allclose(generalized[n, m], expected, rtol=1e-5, atol=1e-6)


def test_equals_pycocotools_with_crowds():
    a, b = draw(0, 5), draw(1, 3)
    iou, over_area, _ = pairwise(a.astype(np.float32), b.astype(np.float32))
    a, b = (np.concatenate([v[:, :2], v[:, 2:] - v[:, :2]], axis=1) for v in (a, b))
    np.testing.assert_allclose(iou, coco.iou(a, b, [0, 0, 0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(over_area, coco.iou(a, b, [1, 1, 1]), rtol=1e-5, atol=1e-6)


ZOO = np.array(
    [
        (0, 0, 0, 0),
        (3, 4, 3, 4),
        (3, 4, 3, 9),
        (1, 4, 5, 4),
        (1, 2, 5, 7),
        (5, 7, 9, 9),
        (50, 50, 60, 60),
        (5, 7, 1, 2),
        (5, 2, 1, 7),
        (1, 1, 1 + 1e-6, 1 + 1e-6),
        (0, 0, 1e-20, 1e-20),
        (0, 0, 1e-38, 3),
        (-1e4, -1e4, 1e4, 1e4),
    ],
    np.float32,
)


def test_degenerate_boxes_have_finite_values_and_gradients():
    """Every pair of empty, equal, touching, distant, reversed, tiny and huge boxes."""
    a, b = (jnp.asarray(v) for v in np.broadcast_arrays(ZOO[:, None], ZOO[None]))
    reversed_ = (ZOO[:, 2:] < ZOO[:, :2]).any(-1)
    proper = ~(reversed_[:, None] | reversed_[None, :])
    found = all_kinds(a, b, jnp.ones((4, *a.shape[:2])))
    for kind, parts in found.items():
        assert all(np.isfinite(part).all() for part in parts), kind
        lowest = {"iou": 0, "complete_iou": -2}.get(kind, -1)
        assert lowest <= parts[0][proper].min() <= parts[0][proper].max() <= 1, kind
    slopes = jax.jit(jax.grad(lambda *v: pairwise(*v)[1].sum(), (0, 1)))(ZOO, ZOO)
    assert all(np.isfinite(slope).all() for slope in slopes)
    # A box lies on itself, whatever its shape; empty ones lie nowhere.
    same = np.diagonal(found["complete_iou"][0])
    np.testing.assert_allclose(same[[4, 6, 12]], 1, rtol=1e-6)
    np.testing.assert_array_equal(same[:4], 0)


def test_of_columns_is_that_of_boxes_bit_for_bit():
    """`iou` is held against others above; this form differs only where nothing is shared."""
    rng = np.random.default_rng(0)
    fine = draw(0, 301).astype(np.float32)
    whole = rng.integers(-3, 4, (301, 4)).astype(np.float32)  # turned, empty and side by side
    strange = np.where(rng.uniform(size=(301, 4)) < 0.2, np.nan, 1e-6 * whole).astype(np.float32)
    apply, compare = jax.jit(ops.column_iou), jax.jit(ops.pairwise_iou)
    for boxes in (fine, whole, strange):
        columns, areas = boxes.T, ops.box_area(jnp.asarray(boxes))
        for box in boxes[np.isfinite(boxes).all(axis=1)][:40]:
            found = np.asarray(apply(box, *columns, areas))
            expected = np.asarray(compare(box[None], boxes)[0])
            shared = expected > 0
            np.testing.assert_array_equal(found[shared], expected[shared])
            assert (found[~shared] <= 0).all()


def test_distant_boxes_are_pulled_together():
    """Where IoU is 0 with no gradient, a step up the others' gradient raises them."""
    box, target = jnp.array([0.0, 0, 2, 3]), jnp.array([20.0, 10, 25, 17])

    @jax.jit
    def step(box):
        out = {}
        for kind in KINDS:
            value, slope = jax.value_and_grad(getattr(ops, kind))(box, target)
            size = jnp.abs(slope).max()
            out[kind] = (value, size, getattr(ops, kind)(box + 0.1 * slope / size, target))
        return out

    values = step(box)
    assert values.pop("iou")[:2] == (0, 0)
    for kind, (before, _, after) in values.items():
        assert before < after < 0, kind
