"""The published algorithm of two-stage detectors in NumPy, one box at a time."""

import math

import numpy as np

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
ONES = (1.0, 1.0, 1.0, 1.0)


def boxes_in(rng, count, size, smallest=2.0):
    """Random boxes inside an image of `size` rows and columns."""
    low = rng.uniform(0, 0.8, (count, 2)) * size[::-1]
    high = np.minimum(low + smallest + rng.uniform(0, 0.5, (count, 2)) * size[::-1], size[::-1])
    return np.concatenate([low, high], axis=1).astype(np.float32)


def shared_area(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def iou(a, b):
    shared = shared_area(a, b)
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def anchors(grid, stride, sizes, ratios):
    """torchvision's: half sides rounded, around (x * stride, y * stride), ratios outside sizes."""
    found = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            for ratio in ratios:
                for size in sizes:
                    half = np.float32(size) / 2 * np.array([ratio**-0.5, ratio**0.5], np.float32)
                    w, h = np.round(half)
                    found.append((x * stride - w, y * stride - h, x * stride + w, y * stride + h))
    return np.array(found, np.float64)


def encode(box, anchor, weights=ONES):
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    bw, bh = box[2] - box[0], box[3] - box[1]
    moves = ((box[0] + box[2] - anchor[0] - anchor[2]) / 2 / w,
             (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / h)  # fmt: skip
    return np.array([*moves, math.log(bw / w), math.log(bh / h)]) * weights


def decode(delta, anchor, weights=ONES):
    dx, dy, dw, dh = np.asarray(delta, np.float64) / weights
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + w / 2 + dx * w, anchor[1] + h / 2 + dy * h
    w, h = (side * math.exp(min(d, math.log(1000 / 16))) for side, d in ((w, dw), (h, dh)))
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def clip(box, size):
    return np.clip(box, 0, [size[1], size[0], size[1], size[0]])


def suppress(boxes, scores, threshold):
    """Indices that are kept, best first."""
    kept = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        if all(iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def match(regions, boxes, there, ignored, positive, negative, rescue):
    """Index of the object, -1 for background, -2 for neither."""
    objects = [n for n in range(len(boxes)) if there[n]]
    overlaps = np.array([[iou(r, boxes[n]) for n in objects] for r in regions])
    found = []
    for a, region in enumerate(regions):
        best = overlaps[a].max() if objects else 0.0
        rescued = rescue and any(
            overlaps[a, i] > 0 and overlaps[a, i] == overlaps[:, i].max()
            for i in range(len(objects))
        )
        crowded = any(
            shared_area(region, boxes[n]) > 0.5 * area(region)
            for n in range(len(boxes))
            if ignored[n]
        )
        if objects and (best >= positive or rescued):
            found.append(objects[overlaps[a].argmax()])
        elif best < negative and not crowded:
            found.append(-1)
        else:
            found.append(-2)
    return np.array(found)


def propose(logits, deltas, grids, size, candidates, count, threshold):
    """Proposals of one image from the scores of each map, and their logits."""
    boxes, scores, levels = [], [], []
    for level, (own, moves, places) in enumerate(zip(logits, deltas, grids, strict=True)):
        for i in np.argsort(-own, kind="stable")[:candidates]:
            box = clip(decode(moves[i], places[i]), size)
            if min(box[2] - box[0], box[3] - box[1]) >= 1e-3:
                boxes.append(box)
                scores.append(own[i])
                levels.append(level)
    boxes, scores, levels = np.array(boxes).reshape(-1, 4), np.array(scores), np.array(levels)
    kept = []
    for level in set(levels):
        own = np.flatnonzero(levels == level)
        kept += [own[i] for i in suppress(boxes[own], scores[own], threshold)]
    kept = sorted(kept, key=lambda i: -scores[i])[:count]
    return boxes[kept], scores[kept]


def detect(probabilities, deltas, proposals, size, score_threshold, threshold, count):
    """Boxes, scores and classes of one image from (N, K + 1) probabilities."""
    found = []
    for c in range(1, probabilities.shape[1]):
        boxes, scores = [], []
        for n, proposal in enumerate(proposals):
            box = clip(decode(deltas[n, c], proposal, DELTA_WEIGHTS), size)
            if probabilities[n, c] > score_threshold and min(box[2:] - box[:2]) >= 1e-2:
                boxes.append(box)
                scores.append(probabilities[n, c])
        found += [(scores[i], c - 1, boxes[i]) for i in suppress(boxes, scores, threshold)]
    found.sort(key=lambda each: -each[0])
    scores, classes, boxes = zip(*found[:count], strict=True)
    return np.array(boxes), np.array(scores), np.array(classes)
