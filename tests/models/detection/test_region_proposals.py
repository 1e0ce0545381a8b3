"""Region proposals against the definition in NumPy loops, and against torch's losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models.detection import two_stage as oracle
from torch.nn import functional

from jaxmodels.models.detection.region_proposals import AnchorScores, RegionProposals

SIZE = (40, 56)
STRIDES, SIZES, RATIOS = (8, 16), ((11, 15), (17, 29)), (0.5, 1.0, 1.7)
MODEL = RegionProposals(
    STRIDES,
    SIZES,
    RATIOS,
    candidates=(23, 19),
    count=(31, 17),
    samples=1000,
    width=5,
    iou_threshold=0.4,
)
GRIDS = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES]
ANCHORS = [oracle.anchors(*each, RATIOS) for each in zip(GRIDS, STRIDES, SIZES, strict=True)]
# Places without a box, an ignored one that holds anchors, and an image with nothing at all.
BOXES = np.zeros((3, 5, 4), np.float32)
BOXES[0, :4] = [(3, 2, 17, 14), (20, 5, 52, 38), (21, 8, 50, 40), (22, 22, 26, 25)]
BOXES[1, 1:3] = [(30, 4, 49, 29), (0, 0, 44, 40)]
THERE = np.array([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5], bool)
IGNORED = np.array([[0] * 5, [0, 0, 1, 0, 0], [0] * 5], bool)


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    counts = [len(each) for each in ANCHORS]
    logits = [rng.normal(size=(3, n)) for n in counts]
    deltas = [rng.normal(size=(3, n, 4)) * 0.4 for n in counts]
    logits, deltas, anchors = (
        tuple(jnp.asarray(x, jnp.float32) for x in each) for each in (logits, deltas, ANCHORS)
    )
    return AnchorScores(logits, deltas, anchors)


def test_network_is_shared_by_maps_and_lies_as_torchs():
    """The head's outputs in torch's layout, and the anchors they belong to."""
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=(2, *grid, 7)).astype(np.float32) for grid in GRIDS]
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), maps)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 5, shapes)
    found = jax.jit(MODEL.apply)(params, maps)
    weights = {
        name: (torch.tensor(each["kernel"].transpose(3, 2, 0, 1)), torch.tensor(each["bias"]))
        for name, each in params["params"].items()
    }
    for i, x in enumerate(maps):
        x = torch.tensor(x.transpose(0, 3, 1, 2))
        hidden = functional.relu(functional.conv2d(x, *weights["conv"], padding=1))
        logits = functional.conv2d(hidden, *weights["objectness"])
        deltas = functional.conv2d(hidden, *weights["boxes"]).unflatten(1, (-1, 4))
        np.testing.assert_allclose(
            found.logits[i], logits.permute(0, 2, 3, 1).flatten(1), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            found.deltas[i], deltas.permute(0, 3, 4, 1, 2).flatten(1, 3), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(found.anchors[i], ANCHORS[i], rtol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_proposals_are_those_of_the_definition(scored, train):
    sizes = np.array([SIZE, (31, 43), (40, 37)], np.float32)
    found = jax.jit(lambda scored: MODEL.proposals(scored, jnp.asarray(sizes), train=train))(scored)
    candidates, count = (23, 31) if train else (19, 17)
    assert found.boxes.shape == (3, count, 4)
    for b in range(3):
        logits, deltas = ([np.asarray(x[b]) for x in each] for each in scored[:2])
        boxes, scores = oracle.propose(
            logits, deltas, ANCHORS, sizes[b], candidates, count, MODEL.iou_threshold
        )
        assert found.valid[b].sum() == len(boxes)
        np.testing.assert_array_equal(found.valid[b], np.arange(count) < len(boxes))
        np.testing.assert_allclose(found.boxes[b, : len(boxes)], boxes, rtol=1e-4, atol=1e-3)
        expected = 1 / (1 + np.exp(-scores))
        np.testing.assert_allclose(found.scores[b, : len(boxes)], expected, rtol=1e-5)
        np.testing.assert_array_equal(found.scores[b, len(boxes) :], 0)


def test_loss_and_its_gradients_are_those_of_the_definition(scored):
    """All anchors that are not left out are samples here, so that nothing is drawn."""
    anchors = np.concatenate(ANCHORS)
    matches = np.stack([
        oracle.match(anchors, *each, 0.7, 0.3, True)
        for each in zip(BOXES, THERE, IGNORED, strict=True)
    ])  # fmt: skip
    # All three kinds occur, rescued anchors among them, and the ignored box hides some.
    assert (matches[0] >= 0).sum() >= 4 and (matches[2] == -1).all()
    assert (matches[1] == -2).sum() > len(anchors) / 4
    theirs = [
        torch.cat([torch.tensor(np.asarray(x)) for x in each], 1).requires_grad_()
        for each in scored[:2]
    ]
    found, sampled = matches >= 0, matches > -2
    targets = [oracle.encode(BOXES[b, matches[b, a]], anchors[a]) for b, a in np.argwhere(found)]
    errors = functional.smooth_l1_loss(
        theirs[1][torch.tensor(found)], torch.tensor(np.array(targets)).float(),
        beta=1 / 9, reduction="sum",
    )  # fmt: skip
    expected = {
        "proposal_boxes": errors / sampled.sum(),
        "proposal_objectness": functional.binary_cross_entropy_with_logits(
            theirs[0][torch.tensor(sampled)], torch.tensor(found[sampled]).float()
        ),
    }
    sum(expected.values()).backward()

    def loss(logits, deltas):
        terms = MODEL.losses(
            AnchorScores(logits, deltas, scored.anchors),
            *map(jnp.asarray, (BOXES, THERE, IGNORED)),
            jax.random.key(0),
        )
        return sum(terms.values()), terms

    gradients, terms = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*scored[:2])
    assert terms.keys() == expected.keys()
    for name in terms:
        np.testing.assert_allclose(terms[name], expected[name].detach(), rtol=1e-5)
    for ours, reference in zip(gradients, theirs, strict=True):
        ours = np.concatenate(ours, axis=1)
        np.testing.assert_allclose(ours, reference.grad, rtol=1e-4, atol=1e-7)


def test_samples_are_drawn_anew_and_half_of_them_are_objects_at_most(scored):
    model = MODEL.clone(samples=12, positive_share=0.25)
    boxes = np.repeat(BOXES, 2, axis=1)
    boxes[0, 5:] = np.concatenate([ANCHORS[0][30:34], ANCHORS[1][20:21]])
    there = np.repeat(THERE, 2, axis=1)
    there[0, 5:] = True

    @jax.jit
    def gradients(logits, key):
        def loss(logits):
            scores = scored._replace(logits=logits)
            objects = map(jnp.asarray, (boxes, there, np.zeros_like(there)))
            return model.losses(scores, *objects, key)["proposal_objectness"]

        return jnp.concatenate(jax.grad(loss)(logits), axis=1)

    first, second = (np.asarray(gradients(scored.logits, jax.random.key(k))) for k in (0, 1))
    assert ((first != 0) != (second != 0)).any()
    for found in (first, second):
        np.testing.assert_array_equal((found != 0).sum(axis=1), 12)
        np.testing.assert_array_equal((found < 0).sum(axis=1)[[0, 2]], [3, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strides": (8,)}, r"\{'strides': 1, 'anchor_sizes': 2, 'maps': 2\} must be equally many"),
        ({"anchor_sizes": ((8,), (8, 16))}, r"anchor_sizes=\(\(8,\), \(8, 16\)\) differ in number"),
    ],
)
def test_bad_input(fields, message):
    maps = [jnp.zeros((1, *grid, 3)) for grid in GRIDS]
    with pytest.raises(ValueError, match=f"RegionProposals: {message}"):
        MODEL.clone(**fields).init(jax.random.key(0), maps)
