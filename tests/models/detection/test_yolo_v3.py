"""YOLO v3: its loss against loops in torch, its network against torch's layers."""

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
from torch.nn import functional

import jaxmodels
from jaxmodels.models.detection.yolo_places import AnchorPlaces, first_at
from jaxmodels.models.detection.yolo_v3 import YoloV3, yolo_losses

ANCHORS = (((5, 4), (9, 7)), ((12, 13), (19, 11), (25, 30)))
SIZE = (24, 40)
LEVELS = [(6, 10, 4, ANCHORS[0]), (3, 5, 8, ANCHORS[1])]
PLACES = AnchorPlaces(((6, 10), (3, 5)), (4, 8), ANCHORS)
COUNT = 6 * 10 * 2 + 3 * 5 * 3


def cross_entropy(target, logit):
    return functional.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target))


def naive(raw, boxes, labels, valid, ignored, box_loss="l2"):
    owners = yolo.anchor_owners(boxes, valid, LEVELS)
    terms = dict.fromkeys(("box", "object", "no_object", "class"), torch.zeros(()))
    for said, (key, stride, anchor) in zip(raw, yolo.all_places(LEVELS), strict=True):
        _, row, column, _ = key
        predicted = yolo.anchor_box(said, row, column, stride, anchor)
        found = [float(v.detach()) for v in predicted]
        if key in owners:
            n = owners[key]
            x1, y1, x2, y2 = box = boxes[n].tolist()
            if box_loss == "giou":
                error = 1 - generalised(predicted, box)
            else:
                error = (2 - (x2 - x1) * (y2 - y1) / (SIZE[0] * SIZE[1])) * (
                    cross_entropy((x1 + x2) / 2 / stride - column, said[0])
                    + cross_entropy((y1 + y2) / 2 / stride - row, said[1])
                    + (said[2] - np.log((x2 - x1) / anchor[0])) ** 2 / 2
                    + (said[3] - np.log((y2 - y1) / anchor[1])) ** 2 / 2
                )
            terms["box"] = terms["box"] + error
            terms["object"] = terms["object"] + cross_entropy(1, said[4])
            for k in range(yolo.CLASSES):
                terms["class"] = terms["class"] + cross_entropy(float(labels[n] == k), said[5 + k])
        elif yolo.is_background(found, boxes, valid, ignored, 0.5):
            terms["no_object"] = terms["no_object"] + cross_entropy(0, said[4])
    return terms


def generalised(a, b):
    """Intersection over union less the share of the hull that neither covers."""
    iou, shared, areas = yolo.overlap(a, b)
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return iou - (hull - (sum(areas) - shared)) / hull


ours = {
    kind: yolo.with_gradient(partial(yolo_losses, places=PLACES, box_loss=kind))
    for kind in ("l2", "giou")
}


@settings(deadline=None, max_examples=12)
@given(kind=st.sampled_from(["l2", "giou"]), crowded=st.booleans(), seed=st.integers(0, 2**32 - 1))
@example(kind="l2", crowded=True, seed=0)
@example(kind="giou", crowded=True, seed=0)
def test_loss_is_that_of_darknet(kind, crowded, seed):
    shape = (COUNT, 5 + yolo.CLASSES)
    yolo.check_losses(ours[kind], partial(naive, box_loss=kind), shape, SIZE, crowded, seed)


def test_places():
    """Which one a box gets, which box of several, and what comes back from its targets."""
    boxes = np.array(
        [
            [9, 9, 14, 13],  # the first anchor, cell (2, 2) of the fine map
            [0, 0, 25, 24],  # the last anchor, cell (1, 1) of the coarse one
            [9.5, 8, 13.5, 13],  # as the first
            [36, 18, 40, 24],  # in the last column
            [8.5, 8.5, 13.5, 13.5],  # as the first
        ],
        np.float32,
    )
    places = np.asarray(jax.jit(PLACES.of)(boxes))
    fine, coarse = 120, 3
    expected = [(2 * 10 + 2) * 2, fine + (1 * 5 + 1) * coarse + 2, 44, (5 * 10 + 9) * 2, 44]
    np.testing.assert_array_equal(places, expected)
    valid = jnp.array([False, True, True, True, True])
    found = first_at(jnp.asarray(places), valid)
    np.testing.assert_array_equal(found, [False, True, True, True, False])

    @jax.jit
    def there_and_back(boxes):
        target = PLACES.encode(boxes, jnp.asarray(places))
        logits = jnp.log(target[:, :2]) - jnp.log1p(-target[:, :2])
        raw = jnp.zeros((COUNT, 4)).at[places].set(jnp.concatenate([logits, target[:, 2:]], 1))
        return target, PLACES.decode(raw)[places]

    for row in (0, 1, 3):
        target, back = there_and_back(np.repeat(boxes[row : row + 1], 5, axis=0))
        which = {0: 0, 1: 1, 3: 3}[row]
        np.testing.assert_allclose(back[which], boxes[row], rtol=1e-4, atol=1e-4)
        assert ((target[which, :2] >= 0) & (target[which, :2] <= 1)).all()


def test_padding_changes_nothing_and_an_image_may_be_empty():
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(COUNT, 5 + yolo.CLASSES)), jnp.float32)
    boxes, labels, valid, ignored = map(jnp.asarray, yolo.scene(np.random.default_rng(16), SIZE))
    gradient, terms = ours["l2"](raw, boxes, labels, valid, ignored)
    order = jnp.argsort(labels < 0, stable=True)
    filled = int((labels >= 0).sum())
    assert 2 < filled < len(labels) and int(ignored.sum())
    order = order.at[filled:].set(filled)
    other = boxes.at[filled].set(jnp.array([3, 4, 17, 21.0]))
    again = ours["l2"](raw, other[order], labels[order], valid[order], ignored[order])
    chex.assert_trees_all_equal((gradient, terms), again)
    none = jnp.zeros_like(valid)
    _, empty = ours["l2"](raw, boxes, labels, none, none)
    assert {name: float(term) for name, term in empty.items()} == {
        **dict.fromkeys(("box", "object", "class"), 0.0),
        "no_object": pytest.approx(float(jnp.logaddexp(0, raw[:, 4]).sum())),
    }


@pytest.mark.parametrize("spp", [False, True])
def test_network_is_that_of_torch(spp):
    fields = {"num_classes": 2, "levels": ("C1", "C3"), "anchors": ANCHORS, "widths": (3, 5)}

    class Flat(YoloV3):
        def __call__(self, images, *, train=False):
            maps = super().__call__(images, train=train)
            return jnp.concatenate([x.reshape(2, -1) for x in maps], axis=1)[:, None, None]

    model = Flat(oracle.SmallBackbone(), **fields, spp=spp)
    x = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype(np.float32)
    variables = oracle.random_variables(model, jnp.asarray(x))

    def forward(params, stats, x):
        def head(name, x, spp=False):
            for i in range(1, 6):
                if i == 3 and spp:
                    x = pyramid(params[name]["spp"], stats[name]["spp"], x)
                else:
                    unit = f"conv_{i}"
                    x = yolo.unit(params[name][unit], stats[name][unit], x, True)
            return x

        def said(level, x):
            name = f"last_{level}"
            x = yolo.predict(
                params[f"predict_{level}"], yolo.unit(params[name], stats[name], x, True)
            )
            return oracle.channels_last(x).flatten(1)

        fine, _, coarse = oracle.small_backbone(params["backbone"], stats["backbone"], x, True)
        coarse = head("head_C3", coarse, spp)
        up = yolo.unit(params["up_C1"], stats["up_C1"], coarse, True)
        up = up.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        fine = head("head_C1", torch.cat([up, fine], dim=1))
        return torch.cat([said("C1", fine), said("C3", coarse)], dim=1)[:, :, None, None]

    oracle.check(model, variables, forward, x, train=True)


def pyramid(params, stats, x):
    x = oracle.conv_norm(params["reduce"], stats["reduce"], x, True, functional.silu)
    pooled = [functional.max_pool2d(x, size, 1, size // 2) for size in (5, 9, 13)]
    x = torch.cat([x, *pooled], dim=1)
    return oracle.conv_norm(params["project"], stats["project"], x, True, functional.silu)


class Said(YoloV3):
    """What the network says is what it is given, the coarse map in some of its pixels."""

    def __call__(self, images, *, train=False):
        channels = len(ANCHORS[0]) * (5 + yolo.CLASSES)
        return images[..., :channels], images[:, ::2, ::2, channels:]


def test_detections_are_those_of_the_definition():
    channels = sum(len(each) for each in ANCHORS) * (5 + yolo.CLASSES)
    raw = np.random.default_rng(3).normal(0, 0.7, (2, 6, 10, channels)).astype(np.float32)
    sizes = np.array([[24, 40], [8, 40]], np.float32)
    fields = {"levels": ("C2", "C3"), "anchors": ANCHORS, "widths": (3, 5)}
    model = Said(oracle.SmallBackbone(), yolo.CLASSES, **fields, max_detections=13)
    chex.clear_trace_counter()
    detect = jax.jit(chex.assert_max_traces(n=1)(model.detect))
    found = detect({}, jnp.asarray(raw), jnp.asarray(sizes))
    jax.tree.map(np.testing.assert_array_equal, found, detect({}, jnp.asarray(raw), sizes))
    for i, size in enumerate(sizes):
        boxes, scores = [], []
        maps = model(jnp.asarray(raw[i : i + 1]))
        each = np.concatenate([np.reshape(x, (-1, 5 + yolo.CLASSES)) for x in maps])
        for said, (key, stride, anchor) in zip(
            torch.tensor(each), yolo.all_places(LEVELS), strict=True
        ):
            box = [float(v) for v in yolo.anchor_box(said, *key[1:3], stride, anchor)]
            boxes.append(np.clip(box, 0, np.tile(size[::-1], 2)))
            there = float(np.prod(boxes[-1][2:] - boxes[-1][:2]) > 0)
            scores.append(there * torch.sigmoid(said[4]) * torch.sigmoid(said[5:]))
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), found)
        yolo.check_detections(one, np.array(boxes), np.stack(scores), model.iou_threshold)


SMALL = {"num_classes": 3, "levels": ("C2", "C3"), "widths": (8, 12)}
SMALL |= {"anchors": (((6, 7), (9, 9)), ((12, 11), (14, 14)))}


def test_learns_and_finds():
    yolo.check_learning(YoloV3(yolo.backbone(), **SMALL, box_loss="ciou"))


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (1, 32, 36, 3), "YoloV3: images of 32 x 36 pixels have sides that are not multiples"),
        ({"levels": ("C3", "P9")}, (1, 32, 32, 3), "YoloV3: the backbone has no map 'P9'; it has"),
        ({"widths": (4,)}, (1, 32, 32, 3), r"YoloV3: .* differ in length: {'levels': 2, .*s': 1}"),
        ({}, (1, 32, 32, 2), r"YoloV3: images of shape \(1, 32, 32, 2\) are not"),
    ],
)
def test_bad_input(fields, shape, message):
    model = YoloV3(yolo.backbone(), **{**SMALL, **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_no_such_box_loss():
    with pytest.raises(ValueError, match="yolo_losses: box_loss='l1' is none of"):
        yolo_losses(
            jnp.zeros((COUNT, 8)), *map(jnp.asarray, yolo.scene(np.random.default_rng(0), SIZE)),
            places=PLACES, box_loss="l1",
        )  # fmt: skip


@pytest.mark.parametrize(("spp", "floats"), [(False, 62_001_757), (True, 63_052_381)])
def test_registered(spp, floats):
    """As many numbers as the published yolov3.weights and yolov3-spp.weights hold."""
    model = jaxmodels.create_model("yolo_v3", spp=spp)
    x = jax.ShapeDtypeStruct((2, 416, 416, 3), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert [leaf.shape for leaf in out] == [(2, n, n, 255) for n in (52, 26, 13)]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == floats
