"""Corner pooling against NumPy's running maximum, and torch's for gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops import cumulative
from jaxmodels.ops.corner_pooling import corner_pool

# Axis of (B, Y, X, C), and whether the maximum runs from the far end.
SIDES = {"left": (2, True), "right": (2, False), "top": (1, True), "bottom": (1, False)}


def in_torch(x, cotangent, axis, backwards):
    x = torch.tensor(x, requires_grad=True)
    ends = x.flip(axis) if backwards else x
    out = ends.cummax(dim=axis).values
    out = out.flip(axis) if backwards else out
    out.backward(torch.tensor(cotangent))
    return out.detach(), x.grad


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_equals_torch_in_values_and_gradients(monkeypatch, device):
    monkeypatch.setattr(cumulative, "platform", lambda: device)
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 2, 5, 7, 3)).astype(np.float32)

    @jax.jit
    def all_sides(x, cotangent):
        results = {}
        for side in SIDES:
            out, pull_back = jax.vjp(lambda x, side=side: corner_pool(x, side), x)
            results[side] = out, *pull_back(cotangent)
        return results

    for side, found in all_sides(x, cotangent).items():
        expected = in_torch(x, cotangent, *SIDES[side])
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_top_and_left_meet_in_the_corner_of_an_object():
    """Evidence for the top side stands below it, that for the left side to its right."""
    x = jnp.zeros((1, 5, 7, 1))
    top, left = x.at[0, 3, 2].set(1), x.at[0, 1, 4].set(1)
    pool = jax.jit(lambda left, top: corner_pool(left, "left") + corner_pool(top, "top"))
    assert jnp.argwhere(pool(left, top)[0, :, :, 0] == 2).tolist() == [[1, 2]]


def test_equal_values_share_the_gradient_and_vmap():
    x = jnp.zeros((3, 1, 1, 5, 1), jnp.bfloat16)
    gradient = jax.vmap(jax.grad(lambda x: corner_pool(x, "right")[0, 0, -1, 0]))(x)
    assert gradient.dtype == jnp.bfloat16
    assert (gradient >= 0).all() and (gradient.sum(axis=(1, 2, 3, 4)) == 1).all()
    assert corner_pool(jnp.zeros((1, 0, 3, 2)), "top").shape == (1, 0, 3, 2)


def test_bad_input():
    with pytest.raises(ValueError, match=r"corner_pool: unknown direction 'up'; .*'left', 'right'"):
        corner_pool(jnp.zeros((1, 5, 7, 3)), "up")
