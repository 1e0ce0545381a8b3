"""YOLO v1: its loss against loops of equation 3 in torch, its network against torch's layers."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models.detection import yolo_oracle as yolo

import jaxmodels
from jaxmodels.models.detection.yolo_v1 import YoloV1, grid_losses

PREDICTORS, SIZE, GRID = 2, (35, 44), (5, 4)


def decoded(said, row, column, grid, size):
    """x, y in the cell and roots of the share of the image, as a box in pixels."""
    x = (column + said[0]) / grid[1] * size[1]
    y = (row + said[1]) / grid[0] * size[0]
    return yolo.around(x, y, said[2] ** 2 * size[1], said[3] ** 2 * size[0])


def naive(raw, boxes, labels, valid, ignored):
    owners = {}
    for n, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        row = min(math.floor((y1 + y2) / 2 / SIZE[0] * GRID[0]), GRID[0] - 1)
        column = min(math.floor((x1 + x2) / 2 / SIZE[1] * GRID[1]), GRID[1] - 1)
        if valid[n]:
            owners.setdefault((row, column), n)
    terms = dict.fromkeys(("box", "object", "no_object", "class"), torch.zeros(()))
    for row, column in np.ndindex(GRID):
        said = raw[row, column, : 5 * PREDICTORS].reshape(PREDICTORS, 5)
        found = [
            [float(v) for v in decoded(each, row, column, GRID, SIZE)] for each in said.detach()
        ]
        responsible = None
        if (row, column) in owners:
            n = owners[row, column]
            x1, y1, x2, y2 = box = boxes[n].tolist()
            ious = [yolo.overlap(each, box)[0] for each in found]
            responsible = int(np.argmax(ious))
            if max(ious) == 0:
                responsible = min(range(PREDICTORS), key=lambda p: math.dist(found[p], box))
            x, y, root_w, root_h, confidence = said[responsible]
            terms["box"] = terms["box"] + 5 * (
                (x - ((x1 + x2) / 2 / SIZE[1] * GRID[1] - column)) ** 2
                + (y - ((y1 + y2) / 2 / SIZE[0] * GRID[0] - row)) ** 2
                + (root_w - ((x2 - x1) / SIZE[1]) ** 0.5) ** 2
                + (root_h - ((y2 - y1) / SIZE[0]) ** 0.5) ** 2
            )
            terms["object"] = terms["object"] + (ious[responsible] - confidence) ** 2
            for k in range(yolo.CLASSES):
                wrong = raw[row, column, 5 * PREDICTORS + k] - float(labels[n] == k)
                terms["class"] = terms["class"] + wrong**2
        for p in range(PREDICTORS):
            if p != responsible and yolo.is_background(found[p], boxes, valid, ignored, math.inf):
                terms["no_object"] = terms["no_object"] + 0.5 * said[p, 4] ** 2
    return terms


losses = partial(grid_losses, size=SIZE, predictors=PREDICTORS)
ours = yolo.with_gradient(losses)


@settings(deadline=None, max_examples=12)
@given(crowded=st.booleans(), seed=st.integers(0, 2**32 - 1))
@example(crowded=True, seed=0)
def test_loss_is_that_of_equation_3(crowded, seed):
    shape = (*GRID, 5 * PREDICTORS + yolo.CLASSES)
    yolo.check_losses(ours, naive, shape, SIZE, crowded, seed)


def test_who_is_taught():
    """The first of two objects in a cell; not the image without any; not what is ignored."""
    raw = jnp.zeros((*GRID, 5 * PREDICTORS + yolo.CLASSES)).at[..., 2:4].set(0.3)
    raw = raw.at[..., 4].set(1.0)
    boxes = jnp.array([[0, 0, 9, 6], [1, 1, 9, 5], [20, 20, 44, 35], *[[0, 0, 0, 0]] * 4], float)
    there = jnp.array([True, True, False, False, False, False, False])
    labels = jnp.array([2, 1, 0, -1, -1, -1, -1])
    all_terms = jax.jit(losses)

    def terms(order, valid, ignored):
        found = all_terms(raw, boxes[order], labels[order], valid, ignored)
        return {name: float(term) for name, term in found.items()}

    order, none = jnp.arange(7), jnp.zeros(7, bool)
    alone = terms(order, there.at[1].set(False), none)
    assert terms(order, there, none) == alone
    swapped = order.at[jnp.array([0, 1])].set(jnp.array([1, 0]))
    assert terms(swapped, there, none) == terms(order, there.at[0].set(False), none) != alone
    empty = terms(order, none, none)
    assert empty == {"box": 0, "object": 0, "class": 0, "no_object": 0.5 * GRID[0] * GRID[1]}
    # Of 0.09 x 44 by 0.09 x 35 pixels around the corners at (22 or 33, 21 or 28): two inside.
    ignored = terms(order, none, none.at[2].set(True))
    assert ignored["no_object"] == pytest.approx(0.5 * (GRID[0] * GRID[1] - 4))


FIELDS = {"num_classes": 3, "level": "C3", "width": 4, "stride": 1, "hidden": 7, "dropout": 0.0}


@pytest.mark.parametrize("dense", [True, False])
def test_network_is_that_of_torch(dense):
    fields = {"norm": None, "stride": 2} if dense else {"norm": "batch"}
    size = (48, 32)
    image_size = size if dense else None
    model = YoloV1(oracle.SmallBackbone(), **{**FIELDS, **fields, "image_size": image_size})
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        backbone = params["backbone"], stats["backbone"]
        *_, x = oracle.small_backbone(*backbone, x, True)
        for i, stride in enumerate((1, model.stride, 1, 1), start=1):
            name = f"conv_{i}"
            x = yolo.unit(params[name], stats.get(name), x, True, stride=stride)
        if not dense:
            return yolo.predict(params["predict"], x)
        x = oracle.channels_last(x)
        batch, rows, columns, _ = x.shape
        x = x.flatten(1) @ params["dense"]["kernel"] + params["dense"]["bias"]
        x = yolo.leaky(x) @ params["predict"]["kernel"] + params["predict"]["bias"]
        return oracle.channels_first(x.reshape(batch, rows, columns, -1))

    oracle.check(model, variables, forward, x, train=True)


class Said(YoloV1):
    """What the network says is what it is given."""

    def __call__(self, images, *, train=False):
        return images


def test_detections_are_those_of_the_definition():
    grid, fields = (3, 4), {"predictors": PREDICTORS, "num_classes": yolo.CLASSES}
    rng = np.random.default_rng(3)
    raw = rng.uniform(-0.1, 1.1, (2, *grid, 5 * PREDICTORS + yolo.CLASSES)).astype(np.float32)
    sizes = np.array([[3, 4], [2, 4]], np.float32)
    model = Said(oracle.SmallBackbone(), **fields, score_threshold=0.0, max_detections=11)
    chex.clear_trace_counter()
    detect = jax.jit(chex.assert_max_traces(n=1)(model.detect))
    found = detect({}, jnp.asarray(raw), jnp.asarray(sizes))
    jax.tree.map(np.testing.assert_array_equal, found, detect({}, jnp.asarray(raw), sizes))
    for i, size in enumerate(sizes):
        boxes, scores = [], []
        for row, column, p in np.ndindex(*grid, PREDICTORS):
            said = raw[i, row, column]
            box = decoded(said[5 * p : 5 * p + 5], row, column, grid, grid)
            boxes.append(np.clip(box, 0, np.tile(size[::-1], 2)))
            each = np.clip(said[5 * p + 4], 0, 1) * np.clip(said[5 * PREDICTORS :], 0, 1)
            scores.append(each * (np.prod(boxes[-1][2:] - boxes[-1][:2]) > 0))
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), found)
        yolo.check_detections(one, np.array(boxes), np.array(scores), model.iou_threshold)


def test_learns_and_finds():
    fields = {**FIELDS, "width": 24, "hidden": 48, "image_size": (32, 32), "level": "C3"}
    yolo.check_learning(YoloV1(yolo.backbone(), **fields))


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (1, 40, 32, 3), r"YoloV1: images of shape \(1, 40, 32, 3\) are not of image_size="),
        ({"image_size": None}, (1, 36, 32, 3), "sides that are not multiples of the stride 8; res"),
        ({"stride": 2}, (1, 40, 32, 3), "YoloV1: images of 40 x 32 .* multiples of the stride 16"),
        ({"level": "C9"}, (1, 32, 32, 3), "YoloV1: the backbone has no map 'C9'; it has {'C1': 2"),
    ],
)
def test_bad_input(fields, shape, message):
    model = YoloV1(oracle.SmallBackbone(), **{**FIELDS, "image_size": (32, 32), **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_registered():
    model = jaxmodels.create_model("yolo_v1")
    x = jax.ShapeDtypeStruct((2, 448, 448, 3), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert out.shape == (2, 7, 7, 30)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.ndim == 4 for leaf in leaves) == 24
    # Figure 3's four further convolutions and its two dense layers.
    extra = 9 * 1024 * 1024 * 4 + 4096 + 7 * 7 * 1024 * 4096 + 4096 + 4096 * 1470 + 1470
    backbone = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["backbone"]))
    assert sum(leaf.size for leaf in leaves) == backbone + extra
