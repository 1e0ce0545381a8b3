"""What the tests of all YOLOs share: scenes, and their losses' parts as loops in torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch_layers as oracle
from torch.nn import functional

from jaxmodels.models.vision.darknet import Darknet

COUNT, CLASSES = 7, 3


def scene(rng, size, crowded=False):
    """Boxes, labels, objects and ignored ones of an image; the last boxes are padding.

    A crowded one has centres that are close to each other.
    """
    low, high = (0.4, 0.6) if crowded else (0, 1)
    image = np.array(size[::-1])
    centres = rng.uniform(low, high, (COUNT, 2)) * image
    half = np.exp(rng.uniform(np.log(0.05), np.log(0.4), (COUNT, 2))) * image
    boxes = np.concatenate([centres - half, centres + half], axis=1)
    boxes = np.clip(boxes, 0, np.tile(image, 2)).astype(np.float32)
    labels = rng.integers(0, CLASSES, COUNT).astype(np.int32)
    labels[rng.integers(2, COUNT + 1) :] = -1
    ignored = (rng.random(COUNT) < 0.25) & (labels >= 0)
    return boxes, labels, (labels >= 0) & ~ignored, ignored


def overlap(a, b):
    """Intersection over union of two boxes of four scalars, and its parts."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return shared / (sum(areas) - shared), shared, areas


def around(x, y, width, height):
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def is_background(found, boxes, valid, ignored, threshold):
    """For a prediction that no object has."""
    for box, is_object, is_ignored in zip(boxes.tolist(), valid, ignored, strict=True):
        iou, shared, areas = overlap(found, box)
        if is_object and iou > threshold:
            return False
        if is_ignored and shared / areas[0] > 0.5:
            return False
    return True


def shape_overlap(a, b):
    shared = min(a[0], b[0]) * min(a[1], b[1])
    return shared / (a[0] * a[1] + b[0] * b[1] - shared)


def anchor_owners(boxes, valid, levels):
    """The object of each (level, row, column, anchor), for v2 and v3.

    levels: (rows, columns, stride, anchors) of each.
    """
    owners = {}
    for n, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if not valid[n]:
            continue
        shapes = [(i, a, each) for i, level in enumerate(levels) for a, each in enumerate(level[3])]
        level, anchor, _ = max(shapes, key=lambda s: shape_overlap((x2 - x1, y2 - y1), s[2]))
        rows, columns, stride, _ = levels[level]
        row = min(math.floor((y1 + y2) / 2 / stride), rows - 1)
        column = min(math.floor((x1 + x2) / 2 / stride), columns - 1)
        owners.setdefault((level, row, column, anchor), n)
    return owners


def anchor_box(said, row, column, stride, anchor):
    """What v2 and v3 mean by t_x, t_y, t_w, t_h."""
    x, y = (column + torch.sigmoid(said[0])) * stride, (row + torch.sigmoid(said[1])) * stride
    return around(x, y, anchor[0] * torch.exp(said[2]), anchor[1] * torch.exp(said[3]))


def all_places(levels):
    for level, (rows, columns, stride, anchors) in enumerate(levels):
        for row in range(rows):
            for column in range(columns):
                for index, anchor in enumerate(anchors):
                    yield (level, row, column, index), stride, anchor


def check_losses(ours, naive, shape, size, crowded, seed):
    """Compares every term, and the gradient of their sum, of one random image.

    Args:
      ours: jitted (raw, boxes, labels, valid, ignored) -> gradient, terms.
      naive: the same in torch, float64, without the gradient.
      shape: of raw.
    """
    rng = np.random.default_rng(seed)
    boxes, labels, valid, ignored = scene(rng, size, crowded)
    raw = rng.normal(0.3, 0.6, shape).astype(np.float32)
    gradient, terms = ours(*map(jnp.asarray, (raw, boxes, labels, valid, ignored)))
    theirs = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
    expected = naive(theirs, boxes, labels, valid, ignored)
    assert {*terms} == {*expected}
    for name, term in terms.items():
        np.testing.assert_allclose(
            term, float(expected[name].detach()), rtol=1e-4, atol=1e-5, err_msg=name
        )
    total = sum(expected.values())
    total.backward()
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-4, atol=1e-5)


def with_gradient(losses):
    """Jitted: the gradient by the first argument of the sum of all terms, and the terms."""

    def total(raw, *scene):
        terms = losses(raw, *scene)
        return sum(terms.values()), terms

    return jax.jit(jax.grad(total, has_aux=True))


def leaky(x):
    return functional.leaky_relu(x, 0.1)


def unit(params, stats, x, train, **options):
    """Convolution, batch norm or bias, leaky ReLU."""
    if "norm" in params:
        return oracle.conv_norm(params, stats, x, train, leaky, **options)
    return leaky(oracle.conv(params["conv"], x, **options))


def predict(params, x):
    bias = params["bias"].reshape(1, -1, 1, 1)
    return oracle.conv(params["conv"], x) + bias


def greedy(boxes, scores, iou_threshold):
    """(score, class, box) that class-wise suppression leaves of scores above zero, best first."""
    kept = []
    for k in range(scores.shape[1]):
        chosen = []
        for p in np.argsort(-scores[:, k], kind="stable"):
            if scores[p, k] > 0 and all(
                overlap(boxes[p], boxes[q])[0] <= iou_threshold for q in chosen
            ):
                chosen.append(p)
        kept += [(scores[p, k], k, boxes[p]) for p in chosen]
    return sorted(kept, key=lambda each: -each[0])


def check_detections(found, boxes, scores, iou_threshold):
    """`found` of one image are the best that the loop keeps of all predictions."""
    expected = greedy(boxes, scores, iou_threshold)[: len(found.scores)]
    count = len(expected)
    np.testing.assert_array_equal(found.valid, np.arange(len(found.valid)) < count)
    np.testing.assert_allclose(found.scores[:count], [each[0] for each in expected], rtol=1e-5)
    np.testing.assert_array_equal(found.classes[:count], [each[1] for each in expected])
    np.testing.assert_allclose(
        found.boxes[:count], np.array([each[2] for each in expected]), rtol=1e-4, atol=1e-4
    )


def backbone():
    """Maps C2, 8 x 8 for images of 32 pixels, and C3."""
    return Darknet((0, 0, 0, 0), (4, 8, 16, 24), num_classes=0)


def squares():
    """Images with a bright and a dark square on grey; boxes, labels; the last box is padding."""
    boxes = np.array(
        [
            [[2, 3, 15, 13], [18, 17, 29, 30], [0, 0, 0, 0]],
            [[16, 2, 30, 14], [0, 0, 0, 0], [0, 0, 0, 0]],
        ],
        np.float32,
    )
    labels = np.array([[0, 2, -1], [1, -1, -1]], np.int32)
    images = np.zeros((2, 32, 32, 3), np.float32)
    for i, n in zip(*np.nonzero(labels >= 0), strict=True):
        x1, y1, x2, y2 = boxes[i, n].astype(int)
        images[i, y1:y2, x1:x2, labels[i, n]] = 1
    return {"image": images, "boxes": boxes, "box_labels": labels}


def check_learning(model, steps=60):
    """Every parameter has a gradient; a few steps on two images, and detection finds the boxes."""
    batch = jax.tree.map(jnp.asarray, squares())
    variables = oracle.random_variables(model, batch["image"])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def learn(params, stats, key):
        def step(carry, key):
            params, stats, state = carry

            def loss(params):
                total, terms, changed = model.loss(params, batch, key, {"batch_stats": stats})
                return total, (terms, changed["batch_stats"])

            gradient, (terms, stats) = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(gradient, state)
            reached = jax.tree.map(lambda leaf: jnp.abs(leaf).max() > 0, gradient)
            return (optax.apply_updates(params, updates), stats, state), (terms, reached)

        start = params, stats, optimizer.init(params)
        return jax.lax.scan(step, start, jax.random.split(key, steps))

    (params, stats, _), (terms, reached) = learn(
        variables["params"], variables["batch_stats"], jax.random.key(0)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(reached):
        assert leaf[0], jax.tree_util.keystr(path)
    total = sum(terms.values())
    assert total[-1] < 0.1 * total[0]
    found = jax.jit(model.detect)({"params": params, "batch_stats": stats}, batch["image"])
    for i, labels in enumerate(squares()["box_labels"]):
        count = int((labels >= 0).sum())
        assert (found.scores[i, :count] > 0.4).all() and not (found.scores[i, count:] > 0.2).any()
        for box, label in zip(batch["boxes"][i, :count].tolist(), labels, strict=False):
            ious = [overlap(each, box)[0] for each in found.boxes[i, :count].tolist()]
            best = int(np.argmax(ious))
            assert ious[best] > 0.7 and found.classes[i, best] == label
