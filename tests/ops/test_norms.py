"""Adaptive layer norm against torch's layer norm, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.norms import adaptive_layer_norm


def draw(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, size=(2, 7, 13))
    return tuple(a.astype(dtype) for a in (x, rng.normal(size=(2, 13)), rng.normal(size=(2, 13))))


def reference(x, shift, scale, epsilon):
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=epsilon)
    return normed * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_equals_torch(epsilon):
    args = [torch.tensor(a, requires_grad=True) for a in draw(np.float64)]
    weights = np.random.default_rng(1).normal(size=(2, 7, 13))
    expected = reference(*args, epsilon)
    (expected * torch.tensor(weights)).sum().backward()

    def loss(*args):
        out = adaptive_layer_norm(*args, epsilon=epsilon)
        return (out * jnp.asarray(weights, jnp.float32)).sum(), out

    ours = [jnp.asarray(a) for a in draw()]
    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*ours)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, args, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-5)


def test_large_offset_keeps_its_precision():
    """The variance is that of centred values; a difference of squares would lose it all."""
    x, shift, scale = (torch.tensor(a) for a in draw(np.float64))
    expected = reference(x + 4000, shift, scale, 1e-6)
    ours = (jnp.asarray(a, jnp.float32) for a in (x + 4000, shift, scale))
    np.testing.assert_allclose(adaptive_layer_norm(*ours), expected, atol=2e-3)


def test_bfloat16_in_bfloat16_out():
    args = [jnp.asarray(a, jnp.bfloat16) for a in draw()]
    out = adaptive_layer_norm(*args)
    assert out.dtype == jnp.bfloat16
    expected = adaptive_layer_norm(*(a.astype(jnp.float32) for a in args))
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=0.01, atol=0.01)


def test_vmap():
    args = [jnp.stack([jnp.asarray(a), 2 * jnp.asarray(a)]) for a in draw()]
    out = jax.vmap(adaptive_layer_norm)(*args)
    for i in (0, 1):
        single = adaptive_layer_norm(*(a[i] for a in args))
        np.testing.assert_allclose(out[i], single, rtol=1e-5, atol=1e-5)
