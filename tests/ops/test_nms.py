"""Non-maximum suppression against its sequential definitions, in NumPy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops import nms as module
from jaxmodels.ops.nms import class_wise_nms, matrix_nms, nms, soft_nms

COUNT = 37


def overlap(a, b):
    wide, high = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [max(0.0, c[2] - c[0]) * max(0.0, c[3] - c[1]) for c in (a, b)]
    shared = wide * high
    return shared / (sum(areas) - shared) if shared else 0.0


def in_order(boxes, scores, valid):
    """Places that hold a box, the best first, of equal ones the first."""
    there = [
        n
        for n in range(len(scores))
        if valid[n] and scores[n] > -np.inf and np.isfinite(boxes[n]).all()
    ]
    return sorted(there, key=lambda n: (-scores[n], n))


def greedy(boxes, scores, threshold, classes=None, valid=None):
    """The definition, box by box."""
    boxes, kept = np.asarray(boxes, np.float64), []
    classes = np.zeros(len(scores)) if classes is None else classes
    for n in in_order(boxes, scores, np.ones(len(scores)) if valid is None else valid):
        rivals = [m for m in kept if classes[m] == classes[n]]
        if all(overlap(boxes[m], boxes[n]) <= threshold for m in rivals):
            kept.append(n)
    return np.isin(np.arange(len(scores)), kept)


compiled = jax.jit(class_wise_nms, static_argnums=3)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    side=st.integers(2, 40),
    strange=st.sampled_from([0, 0.02]),
    threshold=st.sampled_from([0.0, 1 / 3, 0.7]),
)
def test_is_the_sequential_definition(seed, side, strange, threshold):
    """Whole numbers make ties, duplicates, empty and inside-out boxes, and exact overlaps."""
    rng = np.random.default_rng(seed)
    boxes = rng.integers(0, side, size=(COUNT, 4)).astype(np.float32)
    boxes[:, 2:] += rng.integers(0, 4, size=(COUNT, 1))
    boxes[rng.uniform(size=boxes.shape) < strange] = rng.choice([np.nan, np.inf, -np.inf])
    scores = rng.choice([0, -0.0, 0.5, 1, -3, np.nan, -np.inf, np.inf], COUNT).astype(np.float32)
    classes, valid = rng.integers(-1, 2, COUNT, np.int32), rng.uniform(size=COUNT) < 0.9
    found = compiled(boxes, scores, classes, threshold, valid=valid)
    np.testing.assert_array_equal(found, greedy(boxes, scores, threshold, classes, valid))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_in_many_rounds_and_on_accelerators(monkeypatch, device):
    """Blocks smaller than the boxes: what is kept in one must silence boxes of the next."""
    monkeypatch.setattr(module, "_BLOCK", 5)
    monkeypatch.setattr(module, "_BLOCK_ON_CPU", 5)
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    monkeypatch.setattr(module, "_MANY", 8)
    monkeypatch.setattr(module, "platform", lambda: device)

    @jax.jit
    @jax.vmap
    def apply(boxes, scores, classes, valid):
        together = nms(boxes, scores, 0.5, valid=valid)
        return together, class_wise_nms(boxes, scores, classes, 0.5, valid=valid)

    rng = np.random.default_rng(0)
    for _ in range(20):
        low = rng.integers(0, 7, size=(3, COUNT, 2))
        high = low + rng.integers(-1, 6, size=low.shape)
        boxes = np.concatenate([low, high], axis=-1).astype(np.float32)
        scores = rng.integers(0, 5, size=(3, COUNT)).astype(np.float32)
        classes = rng.integers(0, 2, size=(3, COUNT), dtype=np.int32)
        valid = rng.uniform(size=(3, COUNT)) < 0.9
        together, apart = apply(boxes, scores, classes, valid)
        for image in range(3):
            parts = boxes[image], scores[image], 0.5
            np.testing.assert_array_equal(together[image], greedy(*parts, valid=valid[image]))
            expected = greedy(*parts, classes[image], valid[image])
            np.testing.assert_array_equal(apart[image], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_more_boxes_than_a_block_and_a_chain_through_all(dtype):
    """Each box clashes with the next only, so every other one stays: the longest chain.

    But the first, which stays with the second, so that the last of a block silences the next.
    """
    count = 250
    left = np.arange(count) - 9 * (np.arange(count) == 0)
    boxes = np.stack([left, 0 * left, left + 2, 0 * left + 1], axis=1)
    with jax.enable_x64(dtype is np.float64):
        found = jax.jit(nms, static_argnums=2)(boxes.astype(dtype), -left.astype(dtype), 0.3)
    np.testing.assert_array_equal(found, (np.arange(count) % 2 == 1) | (left < 0))


@pytest.mark.parametrize(("long", "threshold"), [(5, 0.5), (3, 0.3), (7, 0.7)])
def test_an_overlap_of_just_the_threshold_is_allowed(long, threshold):
    boxes = jnp.array([[0.0, 0, 10, 1], [0, 0, long, 1], [0, 0, long + 1, 1]])
    found = nms(boxes, jnp.array([3.0, 2.0, 1.0]), threshold)
    assert found.tolist() == [True, True, False]


def test_no_boxes_and_no_gradient():
    assert nms(jnp.zeros((0, 4)), jnp.zeros(0), 0.5).shape == (0,)
    assert soft_nms(jnp.zeros((0, 4)), jnp.zeros(0)).shape == (0,)
    assert matrix_nms(jnp.zeros((0, 4)), jnp.zeros(0)).shape == (0,)
    boxes = jnp.array([[0.0, 0, 2, 2], [0, 0, 2, 3]])

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(scores, boxes):
        return jnp.sum(scores * nms(boxes, scores, 0.5))

    of_scores, of_boxes = gradients(jnp.array([0.1, 0.2]), boxes)
    assert of_scores.tolist() == [0, 1] and not of_boxes.any()


def softly(boxes, scores, method, threshold, sigma, classes, valid):
    """Figure 2 of Bodla et al.: what is left is faded by the best, which is then set aside."""
    scores, left = np.where(valid, scores, 0.0), [*np.flatnonzero(valid)]
    while left:
        best = max(left, key=lambda n: scores[n])
        left.remove(best)
        for n in left:
            if classes[n] == classes[best]:
                shared = overlap(boxes[best], boxes[n])
                if method == "gaussian":
                    scores[n] *= np.exp(-(shared**2) / sigma)
                elif shared >= threshold:
                    scores[n] *= 1 - shared
    return scores


def by_matrix(boxes, scores, method, _, sigma, classes, valid):
    """Equations of SOLOv2; the quotients are taken one by one."""

    def f(shared):
        return 1 - shared if method == "linear" else np.exp(-(shared**2) / sigma)

    order, out = in_order(boxes, scores, valid), np.zeros(len(scores))
    for j in order:
        before = [i for i in order[: order.index(j)] if classes[i] == classes[j]]
        decay = 1.0
        for i in before:
            ahead = [k for k in order[: order.index(i)] if classes[k] == classes[i]]
            hidden = min([f(overlap(boxes[k], boxes[i])) for k in ahead], default=1.0)
            if hidden > 0:
                decay = min(decay, f(overlap(boxes[i], boxes[j])) / hidden)
        out[j] = scores[j] * decay
    return out


def scene(seed, count=23):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 20, size=(count, 2))
    boxes = np.concatenate([low, low + rng.uniform(-1, 15, size=(count, 2))], axis=1)
    boxes[5:8] = boxes[4]
    return boxes, rng.uniform(size=count), rng.integers(0, 2, count), rng.uniform(size=count) < 0.9


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize(("apply", "definition"), [(soft_nms, softly), (matrix_nms, by_matrix)])
def test_fading_scores_and_their_gradients(method, apply, definition):
    """In float64: the order of scores that have faded must not turn on rounding."""
    options = (
        {"sigma": 0.3} if apply is matrix_nms or method == "gaussian" else {"iou_threshold": 0.4}
    )
    with jax.enable_x64(True):

        @jax.jit
        def both(boxes, scores, classes, valid, weights):
            def total(boxes, scores):
                out = apply(boxes, scores, method=method, classes=classes, valid=valid, **options)
                return jnp.sum(weights * out), out

            return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(boxes, scores)

        for seed in range(10):
            boxes, scores, classes, valid = scene(seed)
            weights = np.random.default_rng(seed).normal(size=len(scores))
            (_, found), gradients = both(boxes, scores, classes, valid, weights)

            def by_definition(boxes, scores, *rest):
                return definition(boxes, scores, method, 0.4, options.get("sigma"), *rest)

            rest = classes, valid
            np.testing.assert_allclose(found, by_definition(boxes, scores, *rest), atol=1e-12)
            # Along one direction, as no step is so small that rounding would matter.
            rng, step = np.random.default_rng(seed + 100), 1e-6
            towards = rng.normal(size=boxes.shape), rng.normal(size=scores.shape)
            towards[0][4:8] = 0  # where boxes coincide, the overlap has a kink
            ends = [
                weights @ by_definition(boxes + s * towards[0], scores + s * towards[1], *rest)
                for s in (step, -step)
            ]
            slope = sum(np.sum(g * t) for g, t in zip(gradients, towards, strict=True))
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), atol=1e-6)


@pytest.mark.parametrize("apply", [soft_nms, matrix_nms])
def test_what_is_not_a_box_gets_zero_and_fades_no_other(apply):
    boxes = jnp.array([[0.0, 0, 4, 4], [0, 0, 4, 4], [jnp.nan, 0, 4, 4], [0, 0, 4, 3]])
    scores = jnp.array([jnp.nan, 0.5, 0.9, -jnp.inf])
    batched = jax.jit(jax.vmap(apply))(boxes[None], scores[None])
    assert batched.tolist() == [[0, 0.5, 0, 0]]


@pytest.mark.parametrize(
    ("apply", "options", "message"),
    [
        (nms, {"iou_threshold": 1.5}, r"nms: iou_threshold holds 1.5, outside \[0, 1\]"),
        (nms, {"iou_threshold": float("nan")}, "nms: iou_threshold holds nan"),
        (soft_nms, {"iou_threshold": -0.1}, "soft_nms: iou_threshold holds -0.1"),
        (soft_nms, {"sigma": 0.0}, r"soft_nms: sigma holds 0, outside \(0, inf\]"),
        (soft_nms, {"method": "hard"}, "soft_nms: unknown method 'hard'; pass 'linear' or 'gauss"),
        (matrix_nms, {"method": "hard"}, "matrix_nms: unknown method 'hard'"),
        (matrix_nms, {"sigma": -1.0}, "matrix_nms: sigma holds -1"),
    ],
)
def test_bad_input(apply, options, message):
    with pytest.raises(ValueError, match=message):
        apply(jnp.zeros((2, 4)), jnp.zeros(2), **options)


def test_bad_threshold_of_classes():
    with pytest.raises(ValueError, match="class_wise_nms: iou_threshold holds 2"):
        class_wise_nms(jnp.zeros((2, 4)), jnp.zeros(2), jnp.zeros(2, jnp.int32), 2.0)
