"""Nonlinearities with parameters against torch and by what they can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.layers.activations import Maxout, PReLU, ThresholdPerceptron


@pytest.mark.parametrize("per_channel", [True, False])
def test_prelu_equals_torch(per_channel):
    theirs = torch.nn.PReLU(5 if per_channel else 1)
    x = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    expected = theirs(torch.tensor(x).movedim(-1, 1)).movedim(1, -1)
    out, variables = PReLU(per_channel).init_with_output(jax.random.key(0), jnp.asarray(x))
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-6)
    assert variables["params"]["slope"].shape == theirs.weight.shape


def test_maxout_by_definition():
    x = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    layer = Maxout(4, pieces=3)
    out, variables = layer.init_with_output(jax.random.key(0), jnp.asarray(x))
    maps = variables["params"]["maps"]
    assert maps["kernel"].shape == (5, 12)
    bias = np.arange(12, dtype=np.float32)
    params = {"maps": {"kernel": maps["kernel"], "bias": jnp.asarray(bias)}}
    out = layer.apply({"params": params}, jnp.asarray(x))
    every = np.asarray(x @ np.asarray(maps["kernel"])) + bias
    np.testing.assert_allclose(out, every.reshape(3, 7, 4, 3).max(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "use_bias", "learnt"),
    [("and", True, True), ("xor", True, False), ("and", False, False)],
)
def test_a_perceptron_learns_what_a_line_divides(gate, use_bias, learnt):
    """AND with a threshold; without one (0, 0) fires whatever the weights; XOR never."""
    x = jnp.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    target = {"and": jnp.array([[0.0], [0], [0], [1]]), "xor": jnp.array([[0.0], [1], [1], [0]])}
    layer = ThresholdPerceptron(1, use_bias)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    @jax.jit
    def rule(params):
        errors = lambda p: 0.5 * jnp.sum(jnp.square(layer.apply(p, x) - target[gate]))  # noqa: E731
        return jax.tree.map(lambda p, g: p - g, params, jax.grad(errors)(params)), errors(params)

    for _ in range(50):
        params, error = rule(params)
    assert (error == 0) == learnt
