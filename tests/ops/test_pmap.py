"""Operations under `pmap`, each device with its own part of the batch, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops import dot_product_attention
from jaxmodels.ops.delta_rule import delta_rule, unit_length
from jaxmodels.ops.experts import dropless_experts
from jaxmodels.ops.linear_attention import linear_attention

RNG = np.random.default_rng(0)
Q, K, V = (jnp.asarray(RNG.normal(size=(8, 2, 5, 3, 7)), jnp.float32) for _ in range(3))
BETA = jnp.asarray(RNG.uniform(0, 1, (8, 2, 5, 3)), jnp.float32)
# Small enough that outputs are of the order of one, where their cosine does not magnify rounding.
SHAPES = ((4, 7, 5), (4, 7, 5), (4, 5, 7))
MATRICES = [jnp.asarray(RNG.normal(0, 0.3, shape), jnp.float32) for shape in SHAPES]


def experts(q, k, v, beta):
    chosen = jnp.argsort(q[..., :4], axis=-1)[..., :2].reshape(-1, 2)
    out = dropless_experts(v.reshape(-1, 7), jnp.exp(k.reshape(-1, 7)[:, :2]), chosen, *MATRICES)
    return out.reshape(v.shape)


OPS = {
    "attention": lambda q, k, v, beta: dot_product_attention(q, k, v, causal=True),
    "linear": lambda q, k, v, beta: linear_attention(jnp.exp(q), jnp.exp(k), v)[0],
    "delta": lambda q, k, v, beta: delta_rule(q, unit_length(k), v, beta)[0],
    "experts": experts,
}


@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_are_those_of_one_device(name):
    def both(*arrays):
        out, pull_back = jax.vjp(OPS[name], *arrays)
        return out, pull_back(jnp.cos(out))

    arrays = Q, K, V, BETA
    expected = jax.jit(both)(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
    found = jax.pmap(both)(*arrays)
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        wanted = wanted.reshape(ours.shape)
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
