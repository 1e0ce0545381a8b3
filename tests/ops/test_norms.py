"""Norms against torch's, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.norms import adaptive_layer_norm, batch_norm, layer_norm, rms_norm


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


NORMS = {"layer": (layer_norm, 2), "rms": (rms_norm, 1), "batch": (batch_norm, 2)}


def torch_norm(name, x, *affine, epsilon):
    if name == "batch":
        return torch.nn.functional.batch_norm(
            x.movedim(-1, 1), None, None, *affine, training=True, eps=epsilon
        ).movedim(1, -1)
    functional = {"layer": torch.nn.functional.layer_norm, "rms": torch.nn.functional.rms_norm}
    return functional[name](x, x.shape[-1:], *affine, eps=epsilon)


def first(out):
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_tokens_and_batches_equal_torch(name, epsilon):
    norm, affine = NORMS[name]
    rng = np.random.default_rng(0)
    drawn = [rng.normal(1, 2, (3, 5, 7, 13)), *rng.normal(size=(affine, 13))]
    cotangent = rng.normal(size=(3, 5, 7, 13))
    theirs = [torch.tensor(a, requires_grad=True) for a in drawn]
    expected = torch_norm(name, *theirs, epsilon=epsilon)
    (expected * torch.tensor(cotangent)).sum().backward()
    ours = [jnp.asarray(a, jnp.float32) for a in drawn]
    out, pull = jax.vjp(lambda *args: first(norm(*args, epsilon=epsilon)), *ours)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    for found, tensor in zip(pull(jnp.asarray(cotangent, jnp.float32)), theirs, strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_nothing_as_large_as_x_but_x_is_kept(name):
    norm, affine = NORMS[name]
    x, *others = (jnp.ones(size) for size in [(64, 13)] + [(13,)] * affine)
    _, pull = jax.vjp(lambda *args: first(norm(*args)), x, *others)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) <= x.nbytes + 4 * 64


@pytest.mark.parametrize("name", NORMS)
def test_statistics_in_float32_and_results_in_the_dtype_asked_for(name):
    norm, affine = NORMS[name]
    rng = np.random.default_rng(0)
    args = [
        jnp.asarray(a, jnp.bfloat16) for a in (rng.normal(5, 1, (9, 13)), *np.ones((affine, 13)))
    ]
    exact = first(norm(*(a.astype(jnp.float32) for a in args)))
    wide = first(norm(*args, dtype=jnp.float32))
    assert wide.dtype == jnp.float32 and first(norm(*args)).dtype == jnp.bfloat16
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: first(norm(x, *args[1:])).astype(jnp.float32).sum())(args[0])
    assert gradient.dtype == jnp.bfloat16


def test_layer_norm_of_a_large_offset_keeps_its_precision():
    x, scale, bias = draw()[0][0] + 4000, np.ones(13, np.float32), np.zeros(13, np.float32)
    expected = torch.nn.functional.layer_norm(torch.tensor(x, dtype=torch.float64), (13,), eps=1e-6)
    found = layer_norm(*map(jnp.asarray, (x, scale, bias)))
    np.testing.assert_allclose(found, expected, atol=2e-3)
