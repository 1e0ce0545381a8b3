"""Nonlinearities against torch, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxmodels.ops.activations import (
    ACTIVATIONS,
    activation,
    heaviside,
    maxout,
    prelu,
    rrelu,
    swiglu,
    swish,
    threshold_perceptron,
)


def half(gate):
    """torch's own `glu` is checked below; the others by the definition in torch."""
    return lambda x: x.chunk(2, dim=-1)[0] * gate(x.chunk(2, dim=-1)[1])


TORCHS = {
    "identity": lambda x: 1 * x,
    "heaviside": lambda x: torch.heaviside(x.detach(), torch.ones(())) + 0 * x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "relu6": functional.relu6,
    "rrelu": lambda x: functional.rrelu(x, training=False),
    "squared_relu": lambda x: functional.relu(x) ** 2,
    "relu2": lambda x: functional.relu(x) ** 2,
    "elu": functional.elu,
    "selu": functional.selu,
    "celu": functional.celu,
    "softplus": functional.softplus,
    "softsign": functional.softsign,
    "silu": functional.silu,
    "swish": functional.silu,
    "mish": functional.mish,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hard_sigmoid": functional.hardsigmoid,
    "hard_swish": functional.hardswish,
    "hard_tanh": functional.hardtanh,
    "glu": lambda x: functional.glu(x, dim=-1),
    "swiglu": half(functional.silu),
    "geglu": half(functional.gelu),
    "reglu": half(functional.relu),
}


def test_every_name_has_an_oracle():
    assert TORCHS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", TORCHS)
def test_equals_torch_in_values_and_gradients(name):
    x = np.random.default_rng(0).normal(0, 2, size=(5, 7, 38)).astype(np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    expected = TORCHS[name](theirs)
    cotangent = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    expected.backward(torch.tensor(cotangent))

    @jax.jit
    def both(x):
        out, pull_back = jax.vjp(activation(name), x)
        return out, *pull_back(jnp.asarray(cotangent))

    out, gradient = both(x)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=3e-6)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(activation(name))(x)
    np.testing.assert_allclose(mapped, out, rtol=1e-6, atol=1e-6)
    assert activation(name)(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["gelu", "mish", "softplus", "quick_gelu", "selu", "silu"])
def test_far_from_zero_nothing_overflows(name):
    x = jnp.array([-1e4, -90.0, 90.0, 1e4])
    expected = TORCHS[name](torch.tensor(np.asarray(x)))
    np.testing.assert_allclose(activation(name)(x), expected, rtol=1e-6, atol=1e-6)
    assert np.isfinite(jax.vmap(jax.grad(activation(name)))(x)).all()


def test_swish_with_any_beta():
    x = np.linspace(-5, 5, 23, dtype=np.float32)
    theirs, beta = torch.tensor(x), torch.tensor(1.7, requires_grad=True)
    expected = theirs * torch.sigmoid(beta * theirs)
    expected.sum().backward()
    gradient = jax.grad(lambda beta: swish(jnp.asarray(x), beta).sum())(jnp.float32(1.7))
    np.testing.assert_allclose(swish(jnp.asarray(x), 1.7), expected.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, beta.grad, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 5])
def test_prelu_equals_torch(count):
    x = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    slope = np.linspace(-0.3, 0.8, count, dtype=np.float32)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, slope)]
    expected = functional.prelu(leaves[0].movedim(-1, 1), leaves[1]).movedim(1, -1)
    expected.square().sum().backward()
    ours = jnp.asarray(x), jnp.asarray(slope)
    np.testing.assert_allclose(prelu(*ours), expected.detach(), rtol=1e-6)
    gradients = jax.grad(lambda *a: jnp.square(prelu(*a)).sum(), argnums=(0, 1))(*ours)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-5, atol=1e-6)


def test_rrelu_draws_a_slope_for_every_value():
    x = -jnp.ones((1000,))
    slopes = -rrelu(x, jax.random.key(0), 0.2, 0.6)
    assert 0.2 <= slopes.min() < 0.21 and 0.59 < slopes.max() <= 0.6
    assert abs(slopes.mean() - 0.4) < 0.02 and len(np.unique(slopes)) > 900
    np.testing.assert_array_equal(rrelu(-x, jax.random.key(0)), -x)
    np.testing.assert_allclose(rrelu(x, low=0.2, high=0.6), 0.4 * x, rtol=1e-6)


def test_maxout_by_definition():
    x = np.random.default_rng(0).normal(size=(3, 5, 14)).astype(np.float32)
    expected = np.stack([x[..., 2 * i : 2 * i + 2].max(-1) for i in range(7)], axis=-1)
    np.testing.assert_array_equal(maxout(jnp.asarray(x), 2), expected)
    gradient = jax.grad(lambda x: maxout(x, 2).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, x == np.repeat(expected, 2, axis=-1))


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gradient_of_a_perceptron_is_its_rule(with_bias):
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(7, 5)), rng.integers(2, size=(7, 3))
    kernel, bias = rng.normal(size=(5, 3)), rng.normal(size=3) * with_bias
    fired = (x @ kernel + bias >= 0).astype(float)
    params = [jnp.asarray(a, jnp.float32) for a in ([kernel, bias] if with_bias else [kernel])]

    def loss(params):
        out = threshold_perceptron(jnp.asarray(x, jnp.float32), *params)
        return 0.5 * jnp.sum(jnp.square(out - target)), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(out, fired)
    np.testing.assert_allclose(gradients[0], -x.T @ (target - fired), rtol=1e-5, atol=1e-6)
    if with_bias:
        np.testing.assert_allclose(gradients[1], -(target - fired).sum(0), rtol=1e-5)


def test_at_the_threshold_it_fires():
    np.testing.assert_array_equal(heaviside(jnp.array([-1e-30, 0.0, 1e-30])), [0, 1, 1])


def test_bad_input():
    with pytest.raises(ValueError, match="activation: unknown name 'gellu'; did you mean 'gelu'"):
        activation("gellu")
    with pytest.raises(ValueError, match=r"known: .*'celu'"):
        activation("0")
    with pytest.raises(ValueError, match=r"gated: the last axis .* is odd"):
        activation("swiglu")(jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match="maxout: pieces=2 does not divide"):
        maxout(jnp.zeros((3, 5)), 2)
    with pytest.raises(ValueError, match="maxout: pieces=0"):
        maxout(jnp.zeros((3, 5)), 0)
    with pytest.raises(ValueError, match=r"prelu: slope \(2,\) must hold one value, or .* 5 chan"):
        prelu(jnp.zeros((3, 5)), jnp.zeros(2))


def test_gated_by_silu_equals_torch_and_keeps_its_two_inputs():
    gate, up, cotangent = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    theirs = [torch.tensor(a, requires_grad=True) for a in (gate, up)]
    expected = functional.silu(theirs[0]) * theirs[1]
    expected.backward(torch.tensor(cotangent))
    out, pull = jax.vjp(swiglu, jnp.asarray(gate), jnp.asarray(up))
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-6)
    for found, tensor in zip(pull(jnp.asarray(cotangent)), theirs, strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-5, atol=1e-6)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) == gate.nbytes + up.nbytes
