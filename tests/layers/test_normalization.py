"""Batch norm against torch's, alive and frozen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_layers as oracle

from jaxmodels.layers.normalization import FrozenBatchNorm, batch_norm


def image(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return (3 * x + 2).astype(np.float32)


def run(norm, variables, x, *, train):
    module = batch_norm(norm, train)
    return jax.jit(lambda v, x: module.apply(v, x, mutable=["batch_stats"]))(variables, x)


def torch_norm(variables, *, train):
    module = torch.nn.BatchNorm2d(5).train(train)
    leaves = oracle.tensors({**variables["params"], **variables["batch_stats"]})
    module.weight.data, module.bias.data = leaves["scale"], leaves["bias"]
    module.running_mean, module.running_var = leaves["mean"], leaves["var"]
    return module


@pytest.mark.parametrize(("norm", "train"), [("batch", True), ("batch", False), ("frozen", True)])
def test_equals_torch_with_gradient(norm, train):
    x, g = image(2, 7, 3, 5), image(2, 7, 3, 5, seed=1)
    variables = oracle.random_variables(batch_norm(norm, train), jnp.asarray(x))
    theirs = torch_norm(variables, train=train and norm == "batch")
    image_ = torch.tensor(x, requires_grad=True)
    expected = oracle.channels_last(theirs(oracle.channels_first(image_)))
    (gradient,) = torch.autograd.grad(expected, image_, torch.tensor(g))
    out, new = run(norm, variables, x, train=train)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    ours = jax.grad(lambda x: (run(norm, variables, x, train=train)[0] * g).sum())(jnp.asarray(x))
    np.testing.assert_allclose(ours, gradient, rtol=1e-4, atol=1e-4)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], theirs.running_mean, rtol=1e-5)
    if not (norm == "batch" and train):
        np.testing.assert_array_equal(stats["var"], variables["batch_stats"]["var"])


def test_running_variance_is_that_of_the_batch():
    """Torch keeps the sample variance, n / (n - 1) of it, instead."""
    x = image(2, 7, 3, 5)
    variables = batch_norm("batch", True).init(jax.random.key(0), jnp.asarray(x))
    _, new = run("batch", variables, x, train=True)
    expected = 0.9 + 0.1 * x.astype(np.float64).var(axis=(0, 1, 2))
    np.testing.assert_allclose(new["batch_stats"]["var"], expected, rtol=1e-5)


def test_variables_fit_both_and_frozen_do_not_train():
    x = jnp.asarray(image(2, 3, 3, 5))
    alive, frozen = (batch_norm(n, False).init(jax.random.key(0), x) for n in ("batch", "frozen"))
    assert jax.tree.structure(alive) == jax.tree.structure(frozen)
    jax.tree.map(np.testing.assert_array_equal, alive, frozen)

    def loss(variables, norm):
        return (batch_norm(norm, False).apply(variables, x) ** 3).sum()

    for leaf in jax.tree.leaves(jax.grad(loss)(frozen, "frozen")):
        np.testing.assert_array_equal(leaf, 0)
    for leaf in jax.tree.leaves(jax.grad(loss)(frozen, "batch")["params"]):
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_train_may_come_with_the_call(norm):
    class Model(nn.Module):
        def setup(self):
            self.norm = batch_norm(norm)

        def __call__(self, x, train):
            return self.norm(x, use_running_average=not train)

    x = jnp.asarray(image(2, 3, 3, 5))
    variables = Model().init(jax.random.key(0), x, True)
    nested = {key: value["norm"] for key, value in variables.items()}
    for train in (False, True):
        out, _ = Model().apply(variables, x, train, mutable=["batch_stats"])
        np.testing.assert_allclose(out, run(norm, nested, x, train=train)[0], rtol=1e-6)


def test_low_precision_output_of_float32_arithmetic():
    x = jnp.asarray(image(1, 3, 3, 5))
    variables = oracle.random_variables(FrozenBatchNorm(), x)
    out = FrozenBatchNorm(dtype=jnp.bfloat16).apply(variables, x)
    assert out.dtype == jnp.bfloat16
    expected = FrozenBatchNorm().apply(variables, x).astype(jnp.bfloat16)
    np.testing.assert_array_equal(out, expected)


def test_unknown_norm():
    with pytest.raises(ValueError, match='norm=\'layer\' is neither "batch" nor "frozen"'):
        batch_norm("layer", False)
