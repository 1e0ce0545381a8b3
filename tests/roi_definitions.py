"""The bins of regions by their definitions: for each, how much every pixel counts.

An operation that is linear in the map is then a sum over pixels, and its gradient the
same sum the other way.
"""

import math

import numpy as np


def between(place, length):
    """Weights of an axis's pixels at a place: linear, repeated for a pixel beyond, then nothing."""
    weights = np.zeros(length)
    if not -1 <= place <= length:  # NaN too
        return weights
    place = min(max(place, 0), length - 1)
    first = math.floor(place)
    weights[first] += 1 - (place - first)
    if place > first:
        weights[first + 1] += place - first
    return weights


@np.errstate(invalid="ignore")  # of infinite regions
def sampled_bins(rois, size, image_size, stride, ratio=2, *, aligned=True, moves=None):
    """(B, N, PY, PX, Y, X): means of samples; moves are in sides of the region."""
    weights = np.zeros((*rois.shape[:2], *size, *image_size))
    moves = np.zeros((*rois.shape[:2], *size, 2)) if moves is None else moves
    for b, n, p, q in np.ndindex(*rois.shape[:2], *size):
        x1, y1, x2, y2 = (float(c) / stride for c in rois[b, n])
        high, wide = y2 - y1, x2 - x1
        if aligned:
            x1, y1 = x1 - 0.5, y1 - 0.5
        else:
            high, wide = max(high, 1), max(wide, 1)
        dy, dx = moves[b, n, p, q]
        for r, s in np.ndindex(ratio, ratio):
            y = y1 + high * (p + (r + 0.5) / ratio) / size[0] + dy * high
            x = x1 + wide * (q + (s + 0.5) / ratio) / size[1] + dx * wide
            weights[b, n, p, q] += np.outer(between(y, image_size[0]), between(x, image_size[1]))
    return weights / ratio**2


def whole_pixels(rois, size, image_size, stride, *, closed):
    """(B, N, PY, PX, Y, X): which pixels belong to a bin; the last ones of a region if closed."""
    inside = np.zeros((*rois.shape[:2], *size, *image_size), bool)

    def rounded(value):
        return math.floor(abs(value) / stride + 0.5) * (1 if value > 0 else -1)

    for b, n, p, q in np.ndindex(*rois.shape[:2], *size):
        if not np.isfinite(rois[b, n]).all():
            continue
        x1, y1, x2, y2 = (rounded(float(c)) for c in rois[b, n])
        high, wide = max(1, y2 - y1 + closed), max(1, x2 - x1 + closed)
        for y, x in np.ndindex(*image_size):
            rows = p * high // size[0] <= y - y1 < math.ceil((p + 1) * high / size[0])
            columns = q * wide // size[1] <= x - x1 < math.ceil((q + 1) * wide / size[1])
            inside[b, n, p, q, y, x] = rows and columns
    return inside


def pooled(weights, x):
    """Every bin's sum over the map, and with channels (PY, PX, C), over its own."""
    if x.ndim == 4:
        return np.einsum("bnpqyx,byxc->bnpqc", weights, x)
    return np.einsum("bnpqyx,byxpqc->bnpqc", weights, x)


def pooled_backwards(weights, cotangent, own_channels=False):
    if not own_channels:
        return np.einsum("bnpqyx,bnpqc->byxc", weights, cotangent)
    return np.einsum("bnpqyx,bnpqc->byxpqc", weights, cotangent)
