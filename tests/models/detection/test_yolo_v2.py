"""YOLO v2: its loss against loops in torch, its network against torch's layers."""

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
from jaxmodels.models.detection.image_pyramid import multi_scale_loss
from jaxmodels.models.detection.yolo_places import AnchorPlaces
from jaxmodels.models.detection.yolo_v2 import YoloV2, region_losses

ANCHORS = ((9, 4), (13, 23), (30, 11))
GRID, STRIDE = (3, 5), 11
SIZE = (GRID[0] * STRIDE, GRID[1] * STRIDE)
LEVELS = [(*GRID, STRIDE, ANCHORS)]
PLACES = AnchorPlaces((GRID,), (STRIDE,), (ANCHORS,))


def naive(raw, boxes, labels, valid, ignored):
    owners = yolo.anchor_owners(boxes, valid, LEVELS)
    terms = dict.fromkeys(("box", "object", "no_object", "class"), torch.zeros(()))
    for said, (key, stride, anchor) in zip(raw, yolo.all_places(LEVELS), strict=True):
        _, row, column, _ = key
        found = [float(v) for v in yolo.anchor_box(said.detach(), row, column, stride, anchor)]
        confidence = torch.sigmoid(said[4])
        if key in owners:
            n = owners[key]
            x1, y1, x2, y2 = box = boxes[n].tolist()
            weight = 2 - (x2 - x1) * (y2 - y1) / (SIZE[0] * SIZE[1])
            terms["box"] = terms["box"] + weight / 2 * (
                (torch.sigmoid(said[0]) - ((x1 + x2) / 2 / stride - column)) ** 2
                + (torch.sigmoid(said[1]) - ((y1 + y2) / 2 / stride - row)) ** 2
                + (said[2] - np.log((x2 - x1) / anchor[0])) ** 2
                + (said[3] - np.log((y2 - y1) / anchor[1])) ** 2
            )
            iou = yolo.overlap(found, box)[0]
            terms["object"] = terms["object"] + 5 * (iou - confidence) ** 2 / 2
            terms["class"] = terms["class"] - torch.log_softmax(said[5:], 0)[int(labels[n])]
        elif yolo.is_background(found, boxes, valid, ignored, 0.6):
            terms["no_object"] = terms["no_object"] + confidence**2 / 2
    return terms


losses = partial(region_losses, places=PLACES)
ours = yolo.with_gradient(losses)


@settings(deadline=None, max_examples=12)
@given(crowded=st.booleans(), seed=st.integers(0, 2**32 - 1))
@example(crowded=True, seed=0)
def test_loss_is_that_of_darknet(crowded, seed):
    shape = (GRID[0] * GRID[1] * len(ANCHORS), 5 + yolo.CLASSES)
    yolo.check_losses(ours, naive, shape, SIZE, crowded, seed)


def test_network_is_that_of_torch():
    fields = {"num_classes": 2, "anchors": ANCHORS, "level": "C3", "passthrough": "C1"}
    model = YoloV2(oracle.SmallBackbone(), **fields, width=7, passthrough_width=3)
    x = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype(np.float32)
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        def unit(name, x):
            return yolo.unit(params[name], stats[name], x, True)

        fine, _, x = oracle.small_backbone(params["backbone"], stats["backbone"], x, True)
        x = unit("conv_2", unit("conv_1", x))
        passed = unit("passthrough", fine)
        # By definition: channel (c 4 + i) 4 + j of a cell is c of its pixel (i, j).
        parts = [passed[:, c, i::4, j::4] for c, i, j in np.ndindex(3, 4, 4)]
        x = torch.cat([torch.stack(parts, dim=1), x], dim=1)
        return yolo.predict(params["predict"], unit("conv_3", x))

    oracle.check(model, variables, forward, x, train=True)


class Said(YoloV2):
    """What the network says is what it is given."""

    def __call__(self, images, *, train=False):
        return images


def test_detections_are_those_of_the_definition():
    rng = np.random.default_rng(3)
    outputs = len(ANCHORS) * (5 + yolo.CLASSES)
    raw = rng.normal(0, 0.7, (2, *GRID, outputs)).astype(np.float32)
    levels = [(*GRID, 8, ANCHORS)]
    sizes = np.array([[24, 40], [8, 40]], np.float32)
    model = Said(oracle.SmallBackbone(), yolo.CLASSES, ANCHORS, "C3", max_detections=13)
    chex.clear_trace_counter()
    detect = jax.jit(chex.assert_max_traces(n=1)(model.detect))
    found = detect({}, jnp.asarray(raw), jnp.asarray(sizes))
    jax.tree.map(np.testing.assert_array_equal, found, detect({}, jnp.asarray(raw), sizes))
    for i, size in enumerate(sizes):
        boxes, scores = [], []
        each = torch.tensor(raw[i].reshape(-1, 5 + yolo.CLASSES))
        for said, (key, stride, anchor) in zip(each, yolo.all_places(levels), strict=True):
            box = [float(v) for v in yolo.anchor_box(said, *key[1:3], stride, anchor)]
            boxes.append(np.clip(box, 0, np.tile(size[::-1], 2)))
            there = float(np.prod(boxes[-1][2:] - boxes[-1][:2]) > 0)
            scores.append(there * torch.sigmoid(said[4]) * torch.softmax(said[5:], 0))
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), found)
        yolo.check_detections(one, np.array(boxes), np.stack(scores), model.iou_threshold)


SMALL = {"num_classes": 3, "anchors": ((12, 11), (14, 14)), "level": "C3", "passthrough": "C2"}
SMALL |= {"width": 24, "passthrough_width": 4}


def test_learns_and_finds():
    yolo.check_learning(YoloV2(yolo.backbone(), **SMALL))


def test_trains_at_several_sizes():
    """With any number of boxes and none; shapes alone, the mathematics is that of one size."""
    model = YoloV2(yolo.backbone(), **{**SMALL, "passthrough": None})
    batch = jax.tree.map(jnp.asarray, yolo.squares())
    variables = jax.eval_shape(model.init, jax.random.key(0), batch["image"])
    loss = partial(multi_scale_loss, model, scales=(0.75, 1.0, 1.25))
    key, stats = jax.random.key(0), {"batch_stats": variables["batch_stats"]}
    total, terms, changed = jax.eval_shape(loss, variables["params"], batch, key, stats)
    assert total.shape == () and {*terms} == {"box", "object", "no_object", "class"}
    chex.assert_trees_all_equal_shapes(changed, stats)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (1, 32, 36, 3), "YoloV2: images of 32 x 36 pixels have sides that are not multiples"),
        ({"passthrough": "C0"}, (1, 32, 32, 3), "YoloV2: the backbone has no map 'C0'; it has"),
        ({}, (1, 32, 32, 2), r"YoloV2: images of shape \(1, 32, 32, 2\) are not"),
    ],
)
def test_bad_input(fields, shape, message):
    model = YoloV2(yolo.backbone(), **{**SMALL, **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_registered():
    """As many numbers as the published yolov2.weights, for the 80 classes of COCO, holds."""
    model = jaxmodels.create_model("yolo_v2", num_classes=80)
    x = jax.ShapeDtypeStruct((2, 416, 416, 3), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert out.shape == (2, 13, 13, 425)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 50_983_561
