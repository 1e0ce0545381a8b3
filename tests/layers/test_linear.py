"""The layer against Flax's Dense: same parameters, same output, same initial values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.layers.linear import Linear


@pytest.mark.parametrize("use_bias", [True, False])
def test_is_a_dense(use_bias):
    x = jax.random.normal(jax.random.key(0), (2, 3, 7))
    init = nn.initializers.xavier_uniform()
    theirs = nn.Dense(11, use_bias=use_bias, kernel_init=init)
    ours = Linear(11, use_bias=use_bias)
    params = jax.jit(theirs.init)(jax.random.key(1), x)
    same = jax.tree.map(np.array_equal, params, ours.init(jax.random.key(1), x))
    assert all(jax.tree.leaves(same))
    params = jax.tree.map(lambda p: p + 0.3, params)
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=1e-5, atol=1e-5)


def test_computes_in_its_dtype_with_float32_parameters():
    layer = Linear(11, dtype=jnp.bfloat16)
    out, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 7)))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
