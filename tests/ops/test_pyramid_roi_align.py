"""RoIAlign from a pyramid against each region pooled from its own map in torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.pyramid_roi_align import pyramid_level, pyramid_roi_align

STRIDES, SIZES, CHANNELS, BATCH = (4, 8, 16), ((13, 17), (7, 9), (4, 5)), 3, 2
EXTENT = (52, 68)
OPTIONS = {"strides": STRIDES, "canonical_size": 40.0}


def level_of(roi):
    """Equation 1 with 40 pixels in place of 224: a region of that side has stride 16."""
    side = math.sqrt((roi[2] - roi[0]) * (roi[3] - roi[1]))
    return int(np.clip(math.floor(4 + math.log2(side / 40) + 1e-6), 2, 4)) - 2


def interpolated(image, y, x):
    """A (Y, X, C) torch image at a point; the border pixel goes on."""
    rows, columns = image.shape[:2]
    y, x = (min(max(v, 0.0), n - 1.0) for v, n in ((y, rows), (x, columns)))
    top, left = int(y), int(x)
    down, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    fy, fx = y - top, x - left
    upper = image[top, left] * (1 - fx) + image[top, right] * fx
    lower = image[down, left] * (1 - fx) + image[down, right] * fx
    return upper * (1 - fy) + lower * fy


def pooled(image, roi, stride, size, ratio, aligned):
    left, top, right, bottom = np.asarray(roi, np.float64) / stride - (0.5 if aligned else 0)
    height, width = bottom - top, right - left
    if not aligned:
        height, width = max(height, 1.0), max(width, 1.0)
    bins = []
    for i in range(size[0]):
        for j in range(size[1]):
            total = 0
            for k in range(ratio):
                for m in range(ratio):
                    y = top + (i + (k + 0.5) / ratio) * height / size[0]
                    x = left + (j + (m + 0.5) / ratio) * width / size[1]
                    total = total + interpolated(image, y, x)
            bins.append(total / ratio**2)
    return torch.stack(bins).reshape(*size, -1)


def regions(seed=0):
    """All levels, the whole image, all four corners of it, and both sides of a step."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 36, (BATCH, 11, 2))
    high = low + rng.uniform(6, 16, (BATCH, 11, 2))
    rois = np.concatenate([low, high], axis=-1)
    rois[0, :5] = [(0, 0, 68, 52), (0, 0, 9, 9), (59, 0, 68, 9), (0, 43, 9, 52), (50, 40, 68, 52)]
    rois[1, :3] = [(3, 5, 43, 45), (3, 5, 42, 45), (3, 5, 23, 25)]
    return rois.astype(np.float32)


@pytest.mark.parametrize(("aligned", "ratio", "size"), [(False, 2, (3, 5)), (True, 1, (2, 3))])
def test_equals_each_region_on_its_own_map(aligned, ratio, size):
    rng = np.random.default_rng(3)
    maps = [rng.normal(size=(BATCH, *each, CHANNELS)).astype(np.float32) for each in SIZES]
    rois = regions()
    levels = [[level_of(roi) for roi in each] for each in rois]
    assert {*levels[0], *levels[1]} == {0, 1, 2} and levels[1][:3] == [2, 1, 1]
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in maps]
    expected = torch.stack([
        torch.stack([
            pooled(theirs[level][b], roi, STRIDES[level], size, ratio, aligned)
            for roi, level in zip(rois[b], levels[b], strict=True)
        ])
        for b in range(BATCH)
    ])  # fmt: skip
    weights = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()

    @jax.jit
    def ours(maps, rois):
        def loss(maps):
            out = pyramid_roi_align(
                maps, rois, size, sampling_ratio=ratio, aligned=aligned, **OPTIONS
            )
            return (out * weights).sum(), out

        gradients, out = jax.grad(loss, has_aux=True)(maps)
        return out, gradients, pyramid_level(rois, STRIDES, canonical_size=40.0)

    out, gradients, found = ours([jnp.asarray(x) for x in maps], jnp.asarray(rois))
    np.testing.assert_array_equal(found, levels)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-4, atol=1e-4)
    for mine, reference in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(mine, reference.grad, rtol=1e-4, atol=1e-4)


def test_published_levels():
    """224 pixels have P4, or a rounding error less; halves and doubles are exact steps.

    Beyond the first and last map, those are the nearest.
    """
    sides = np.array([1, 55.9, 56, 111.9, 112, 223.9, 223.9999, 224, 448, 5000, 0], np.float32)
    rois = np.stack([sides * 0, sides * 0, sides, sides], axis=-1)
    found = pyramid_level(jnp.asarray(rois), (4, 8, 16, 32))
    np.testing.assert_array_equal(found, [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 0])


def test_what_lies_outside_is_cut_off():
    """Never is a neighbour on the canvas seen."""
    maps = [jnp.full((1, *each, 1), float(i)) for i, each in enumerate(SIZES)]
    far = jnp.array([[[-90.0, -90, 900, 900], [60, 35, 64, 99], [-50, -50, 3, 3]]])
    out = jax.jit(lambda maps: pyramid_roi_align(maps, far, 3, **OPTIONS))(maps)
    for values, level in zip(out[0], (2, 0, 2), strict=True):
        np.testing.assert_array_equal(values, level)


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ((4, 8), r"pyramid_roi_align: 3 maps need as many strides, not \(4, 8\)"),
        ((4, 8, 8), r"pyramid_level: strides=\[4, 8, 8\] are not powers of two in a row"),
    ],
)
def test_bad_input(strides, message):
    maps = [jnp.zeros((1, *each, 1)) for each in SIZES]
    with pytest.raises(ValueError, match=message):
        pyramid_roi_align(maps, jnp.zeros((1, 1, 4)), 3, strides=strides)
