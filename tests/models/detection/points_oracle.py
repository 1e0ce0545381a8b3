"""Detectors by points: a batch with all that may be in one, and definitions in NumPy and torch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch_layers as oracle

CLASSES = 3
SIZE = (30, 37)


def batch():
    """Three images: objects, an ignored box and padding; nothing; objects on each other."""
    boxes = np.zeros((3, 6, 4), np.float32)
    labels = np.full((3, 6), -1, np.int32)
    ignored = np.zeros((3, 6), bool)
    boxes[0, :3] = [[2, 3, 13, 12], [17, 9, 37, 30], [20, 1, 29.5, 7.5]]
    # Ignored: beside the middle of one object and a corner of another, of their classes.
    boxes[0, 3:] = [[1, 8, 19, 29], [23, 3, 28, 8], [0, 0, 9, 9]]
    labels[0, :5] = [2, 0, 2, 0, 2]
    ignored[0, 3:5] = True
    boxes[2, :3] = [[4, 4, 20, 22], [6, 5, 18.3, 20.9], [4, 4, 20, 22]]
    boxes[2, 3:] = [[9, 17, 36, 28], [25, 2, 34, 13], [27, 5, 31, 9]]
    labels[2] = [1, 1, 0, 2, 1, 0]
    image = np.random.default_rng(0).normal(-0.5, 0.1, size=(3, *SIZE, 3)).astype(np.float32)
    for i, n in zip(*np.nonzero(labels >= 0), strict=True):
        left, top, right, bottom = boxes[i, n].astype(int)
        image[i, top:bottom, left:right] = np.eye(3)[labels[i, n]]
    found = {"image": image, "boxes": boxes, "box_labels": labels, "box_ignored": ignored}
    return jax.tree.map(jnp.asarray, found)


def objects_of(batch, image):
    """Boxes, labels, and which of them are objects and which are ignored, in NumPy."""
    boxes, labels, ignored = (
        np.asarray(batch[name][image]) for name in ("boxes", "box_labels", "box_ignored")
    )
    return boxes.astype(np.float64), labels, (labels >= 0) & ~ignored, (labels >= 0) & ignored


def radius(height, width, overlap):
    """The largest shift of both corners that keeps the overlap, by bisection."""

    def fits(r):
        both = max(0, height - r) * max(0, width - r)
        smaller = max(0, height - 2 * r) * max(0, width - 2 * r)
        area, larger = height * width, (height + 2 * r) * (width + 2 * r)
        return min(both / (2 * area - both), smaller / area, area / larger) >= overlap

    low, high = 0.0, max(height, width)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return int(low)


def heat_maps(points, batch, image, shape, stride, overlap):
    """Heat and where it is taught, cell by cell, of one image; and cells and offsets."""
    boxes, labels, there, ignored = objects_of(batch, image)
    rows, columns, _ = shape
    cells = np.zeros((len(boxes), 2), int)
    offsets = np.zeros((len(boxes), 2))
    heat, taught = np.zeros(shape), np.ones(shape, bool)
    for n in np.flatnonzero(there):
        place = points[n] / stride
        cells[n] = np.minimum(place.astype(int), [columns - 1, rows - 1])
        offsets[n] = place - cells[n]
        width, height = (boxes[n, 2:] - boxes[n, :2]) / stride
        reach = radius(height, width, overlap)
        for y in range(rows):
            for x in range(columns):
                dx, dy = x - cells[n, 0], y - cells[n, 1]
                if max(abs(dx), abs(dy)) <= reach:
                    value = np.exp(-(dx**2 + dy**2) / (2 * ((2 * reach + 1) / 6) ** 2))
                    heat[y, x, labels[n]] = max(heat[y, x, labels[n]], value)
    for y, x, k in np.ndindex(*shape):
        taught[y, x, k] = not any(
            ignored[n]
            and labels[n] == k
            and stride * x <= right
            and stride * (x + 1) >= left
            and stride * y <= bottom
            and stride * (y + 1) >= top
            for n, (left, top, right, bottom) in enumerate(boxes)
        )
    return heat, taught, cells, offsets


def heat_loss(logits, heats, taughts):
    """Equation 1 of CornerNet on torch logits (B, Y, X, K), over all images."""
    p, heat = torch.sigmoid(logits), torch.tensor(np.stack(heats))
    of_object = -((1 - p) ** 2) * torch.log(p)
    of_others = -((1 - heat) ** 4) * p**2 * torch.log(1 - p) * torch.tensor(np.stack(taughts))
    return torch.where(heat == 1, of_object, of_others).sum() / (heat == 1).sum()


def peaks(heat, size, stride, count):
    """(score, class, x, y) of cells that no neighbour of the class exceeds, best first.

    Args:
      heat: logits of one image's map.
      size: rows and columns of the image; cells that begin beyond it do not count.
    """
    heat = 1 / (1 + np.exp(-np.asarray(heat, np.float64)))
    for y, x, k in np.ndindex(*heat.shape):
        if stride * y > size[0] or stride * x > size[1]:
            heat[y, x, k] = 0
    found = [
        (heat[y, x, k], k, x, y)
        for y, x, k in np.ndindex(*heat.shape)
        if heat[y, x, k] == heat[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2, k].max() > 0
    ]
    return sorted(found, key=lambda each: -each[0])[:count]


def random_maps(template, seed=1):
    """Values for what heads say, in the shapes of a pytree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), template)


def check_losses(ours, naive, found):
    """Compares terms, and the gradient of their sum by every leaf of `found`.

    Args:
      ours: found -> terms by name, in jax.
      naive: found, of float64 tensors -> terms by name.
    """

    def total(found):
        terms = ours(found)
        return sum(terms.values()), terms

    (_, terms), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(found)
    leaves, tree = jax.tree.flatten(found)
    leaves = [torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in leaves]
    expected = naive(jax.tree.unflatten(tree, leaves))
    assert {*terms} == {*expected}
    for name, term in expected.items():
        np.testing.assert_allclose(terms[name], float(term.detach()), rtol=2e-5, err_msg=name)
    wanted = torch.autograd.grad(sum(expected.values()), leaves)
    for got, want in zip(jax.tree.leaves(gradients), wanted, strict=True):
        want = want.numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


class Trial:
    """A small detector: its variables, and one compiled gradient of its loss for all tests."""

    def __init__(self, model, in_batch):
        self.model, self.batch = model, in_batch
        variables = dict(oracle.random_variables(model, in_batch["image"]))
        self.params, self.state = variables.pop("params"), variables
        self.gradient = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
        chex.clear_trace_counter()
        self.detect = jax.jit(chex.assert_max_traces(model.detect, n=1))

    def _loss(self, params, state, batch):
        loss, terms, state = self.model.loss(params, batch, jax.random.key(0), state)
        return loss, (terms, state)

    def terms(self, **changed):
        """The terms of the loss where the batch is changed, and the gradient."""
        (_, (terms, _)), gradient = self.gradient(self.params, self.state, self.batch | changed)
        return terms, gradient

    def assert_gradient_reaches_all(self):
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.terms()[1]):
            assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
            assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)

    def assert_padding_changes_nothing(self):
        padding = (self.batch["box_labels"] < 0)[..., None]
        rubbish = jnp.asarray([31.0, -7.0, 5.0, 900.0])[None, None, :]
        boxes = jnp.where(padding, rubbish, self.batch["boxes"])
        jax.tree.map(np.testing.assert_array_equal, self.terms(), self.terms(boxes=boxes))

    def assert_empty_images_are_legal(self, *of_objects):
        """The named terms are zero, the others teach background."""
        terms, gradient = self.terms(box_labels=jnp.full_like(self.batch["box_labels"], -1))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        for name, term in terms.items():
            assert (float(term) == 0) == (name in of_objects), name

    def assert_detect_compiles_once(self):
        variables = {"params": self.params, **self.state}
        for i in range(2):
            found = self.detect(variables, self.batch["image"] + i)
        assert found.boxes.shape == (3, self.model.max_detections, 4)

    def assert_learns(self, steps, learning_rate=1e-2):
        """After some steps on one batch, its objects are found; coinciding ones are left out."""
        optimizer = optax.adam(learning_rate)
        params, state, moments = self.params, self.state, optimizer.init(self.params)
        move = jax.jit(lambda g, m, p: _applied(p, *optimizer.update(g, m)))
        labels = self.batch["box_labels"].at[2, jnp.array([1, 2, 5])].set(-1)
        batch = self.batch | {"box_labels": labels}
        for _ in range(steps):
            (_, (_, state)), gradient = self.gradient(params, state, batch)
            params, moments = move(gradient, moments, params)
        found = jax.device_get(self.detect({"params": params, **state}, batch["image"]))
        for i in range(3):
            boxes, labels, there, _ = objects_of(batch, i)
            for n in np.flatnonzero(there):
                fits = [iou(boxes[n], box) for box in found.boxes[i]]
                good = (found.classes[i] == labels[n]) & (found.scores[i] > 0.15)
                assert max(fits * good) > 0.5, (i, n)


def _applied(params, updates, moments):
    return optax.apply_updates(params, updates), moments


def iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    return shared / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - shared + 1e-9)
