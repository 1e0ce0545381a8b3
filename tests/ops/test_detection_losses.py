"""Losses against torch, and against overlaps worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.detection_losses import heat_map_focal_loss, iou_loss, smooth_l1


def check(ours, theirs, *arrays, rtol=1e-5):
    """Values and the gradient of the first argument."""
    leaves = [torch.tensor(a, dtype=torch.float64) for a in arrays]
    leaves[0].requires_grad_()
    expected = theirs(*leaves)
    expected.sum().backward()

    @jax.jit
    def both(*arrays):
        out, pull_back = jax.vjp(lambda first: ours(first, *arrays[1:]), arrays[0])
        return out, pull_back(jnp.ones_like(out))[0]

    out, slope = both(*(jnp.asarray(a, jnp.float32) for a in arrays))
    np.testing.assert_allclose(out, expected.detach(), rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(slope, leaves[0].grad, rtol=rtol, atol=1e-7)


def test_heat_map_focal_loss():
    def by_paper(logits, heat):
        p = torch.sigmoid(logits)
        near = (1 - heat) ** 4 * p**2 * torch.log(1 - p)
        return -torch.where(heat == 1, (1 - p) ** 2 * torch.log(p), near)

    rng = np.random.default_rng(0)
    heat = rng.uniform(size=(5, 7, 3))
    heat[rng.uniform(size=heat.shape) < 0.3] = 1
    check(heat_map_focal_loss, by_paper, rng.normal(0, 4, heat.shape), heat, rtol=1e-4)


def test_heat_map_focal_loss_of_confident_cells_is_finite():
    logits, heat = jnp.array([200.0, -200, 200, -200]), jnp.array([1.0, 1, 0, 0])
    loss, slope = jax.jit(jax.vmap(jax.value_and_grad(heat_map_focal_loss)))(logits, heat)
    np.testing.assert_allclose(loss, [0, 200, 200, 0], atol=1e-6)
    np.testing.assert_allclose(slope, [0, -1, 1, 0], atol=1e-6)


# IoU 2/10; around both 12; centres 1.5 and 0.5 apart in 3 x 4, and 2 x 2 beside 2 x 4.
BOX, TARGET = (0.0, 1.0, 2.0, 3.0), (1.0, 0.0, 3.0, 4.0)
V = 4 / math.pi**2 * (math.atan(1) - math.atan(0.5)) ** 2
LOSSES = {
    "iou": 0.8,
    "log_iou": math.log(5),
    "giou": 0.8 + 2 / 12,
    "diou": 0.8 + 1 / 25,
    "ciou": 0.8 + 1 / 25 + V**2 / (0.8 + V),
}


def test_iou_losses_worked_out_by_hand():
    boxes, targets = jnp.array([BOX, TARGET]), jnp.array([TARGET, TARGET])

    @jax.jit
    def losses(boxes, targets):
        named = {kind: iou_loss(boxes, targets, kind) for kind in LOSSES}
        return named, iou_loss(boxes, targets)

    named, by_default = losses(boxes, targets)
    for kind, loss in named.items():
        np.testing.assert_allclose(loss, [LOSSES[kind], 0], rtol=1e-5, atol=1e-6, err_msg=kind)
    np.testing.assert_array_equal(by_default, named["giou"])


def test_logarithm_of_an_overlap_and_of_none():
    """Shared 2 of 6; a step of the right side adds two to both, of the left one two to one."""
    boxes = jnp.array([(1.0, 0.0, 3.0, 2.0), (9.0, 9.0, 9.0, 9.0)])
    targets = jnp.array([(0.0, 0.0, 2.0, 2.0), (0.0, 0.0, 2.0, 2.0)])
    loss = jax.vmap(jax.value_and_grad(lambda *pair: iou_loss(*pair, "log_iou")))
    value, slope = jax.jit(loss)(boxes, targets)
    np.testing.assert_allclose(value, [math.log(3), 6 * math.log(10)], rtol=1e-5)
    # d log(union) - d log(shared): the left side gives away 2 / 2, the right one costs 2 / 6.
    np.testing.assert_allclose(slope[0, ::2], [1, 1 / 3], rtol=1e-5)
    np.testing.assert_array_equal(slope[1], 0)


@pytest.mark.parametrize("beta", [1.0, 1 / 9])
def test_smooth_l1(beta):
    errors = np.array([-3.0, -0.5, -0.1, 0.0, 0.05, 0.7, 20.0])
    check(
        lambda e: smooth_l1(e, beta),
        lambda e: torch.nn.functional.smooth_l1_loss(
            e, torch.zeros_like(e), reduction="none", beta=beta
        ),
        errors,
    )
    assert smooth_l1(jnp.array([3.0])).tolist() == [2.5]


def test_bad_input():
    box = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match=r"iou_loss: unknown kind 'l1'; pass one of \('log_iou', "):
        iou_loss(box, box, "l1")
    with pytest.raises(ValueError, match=r"smooth_l1: beta=0\.0 must be positive"):
        smooth_l1(box, 0.0)
    with pytest.raises(ValueError, match=r"heat_map_focal_loss: heat holds 1.5, outside \[0, 1\]"):
        heat_map_focal_loss(box, box + 1.5)
