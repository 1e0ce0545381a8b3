"""The affine map against torch."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.linear import linear


@settings(deadline=None, max_examples=6)
@given(lead=st.lists(st.integers(1, 5), max_size=3), has_bias=st.booleans())
def test_equals_torch_in_value_and_gradient(lead, has_bias):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((*lead, 7), (7, 11), (11,))]
    arrays = arrays[: 2 + has_bias]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = torch.nn.functional.linear(theirs[0], theirs[1].T, theirs[2] if has_bias else None)
    expected.square().sum().backward()

    def loss(*args):
        out = linear(*args)
        return jnp.square(out).sum(), out

    argnums = tuple(range(len(arrays)))
    ours = [jnp.asarray(a) for a in arrays]
    grads, out = jax.grad(loss, argnums=argnums, has_aux=True)(*ours)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, reference in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(ours, reference.grad, rtol=1e-4, atol=1e-4)


def test_kernel_gradient_transposes_nothing():
    """The point of joining the axes: one contracted axis, so no operand is copied."""
    x, kernel = jnp.zeros((3, 5, 7)), jnp.zeros((7, 11))
    gradient = jax.grad(lambda kernel: jnp.square(linear(x, kernel)).sum())
    products = [
        equation.params["dimension_numbers"][0]
        for equation in jax.make_jaxpr(gradient)(kernel).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert products
    assert all(len(axes) == 1 for contracted in products for axes in contracted)


def test_jit_vmap_and_dtype():
    x = jax.random.normal(jax.random.key(0), (2, 3, 7), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (7, 11), jnp.bfloat16)
    out = jax.jit(linear)(x, kernel)
    assert out.dtype == jnp.bfloat16
    mapped = jax.vmap(linear, in_axes=(0, None))(x, kernel)
    np.testing.assert_allclose(mapped.astype(np.float32), out.astype(np.float32), rtol=0.02)


def test_bad_widths():
    with pytest.raises(ValueError, match=r"linear: x of shape \(2, 5\) .* kernel .* \(7, 11\)"):
        inspect.unwrap(linear)(jnp.zeros((2, 5)), jnp.zeros((7, 11)))  # as users run it
