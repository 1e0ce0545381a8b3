"""The tangent parameterisation against torch's gradient descent and the infinite-width kernel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.layers.ntk import NTKLinear


def test_equals_torchs_descent_with_scaled_learning_rates():
    """Three steps on a two-layer network, whose tangent form only rescales parameters."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(13, 5)), rng.normal(size=(13, 3))
    layers = [NTKLinear(7, weight_scale=1.4, bias_scale=0.3), NTKLinear(3, bias_scale=0.0)]
    keys = jax.random.split(jax.random.key(0))
    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    first = layers[0].init(keys[0], inputs[0])
    params = [first, layers[1].init(keys[1], jnp.zeros((1, 7)))]
    assert set(params[1]["params"]) == {"kernel"}
    scales = [1.4 / 5**0.5, 1 / 7**0.5]
    kernels = [
        torch.tensor(s * np.asarray(p["params"]["kernel"], np.float64), requires_grad=True)
        for s, p in zip(scales, params, strict=True)
    ]
    bias = torch.tensor(0.3 * np.asarray(first["params"]["bias"], np.float64), requires_grad=True)
    groups = [
        {"params": [kernels[0]], "lr": 0.1 * scales[0] ** 2},
        {"params": [kernels[1]], "lr": 0.1 * scales[1] ** 2},
        {"params": [bias], "lr": 0.1 * 0.3**2},
    ]
    optimizer = torch.optim.SGD(groups)

    def predict(params, x):
        return layers[1].apply(params[1], jnp.tanh(layers[0].apply(params[0], x)))

    def loss(params, x, y):
        return jnp.square(predict(params, x) - y).sum()

    gradient = jax.jit(jax.grad(loss))
    for _ in range(3):
        theirs = torch.tanh(torch.tensor(x) @ kernels[0] + bias) @ kernels[1]
        ours = predict(params, inputs[0])
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        torch.square(theirs - torch.tensor(y)).sum().backward()
        optimizer.step()
        grads = gradient(params, *inputs)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def test_the_kernel_of_a_wide_network_is_the_limits():
    """One hidden ReLU layer: arc-cosine kernels of order 1 and 0 (Cho and Saul 2009)."""
    x = np.random.default_rng(1).normal(size=(4, 5))
    hidden = NTKLinear(8192, weight_scale=2**0.5, bias_scale=0.0)
    out = NTKLinear(1, bias_scale=0.0)
    inputs = jnp.asarray(x, jnp.float32)
    keys = jax.random.split(jax.random.key(2))
    params = hidden.init(keys[0], inputs), out.init(keys[1], jnp.zeros((1, 8192)))

    def value(params, row):
        return out.apply(params[1], jax.nn.relu(hidden.apply(params[0], row)))[0]

    jacobian = jax.vmap(jax.grad(value), (None, 0))(params, inputs)
    rows = jnp.concatenate([leaf.reshape(4, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    covariance = 2 * x @ x.T / 5
    size = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    angle = np.arccos(np.clip(covariance / size, -1, 1))
    outer = size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    inner = covariance * (np.pi - angle) / (2 * np.pi)
    np.testing.assert_allclose(rows @ rows.T, outer + inner, atol=0.05 * (outer + inner).max())


def test_dtype_and_bad_input():
    layer = NTKLinear(3, dtype=jnp.bfloat16)
    out, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and out.shape == (2, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    for fields in ({"weight_scale": 0.0}, {"bias_scale": -1.0}):
        with pytest.raises(ValueError, match=r"NTKLinear: weight_scale=.* above 0"):
            inspect.unwrap(NTKLinear)(3, **fields)
