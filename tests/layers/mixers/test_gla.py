"""The layer against the equations of the GLA paper in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.mixers.gla import GatedLinearAttention

BATCH, TIME, WIDTH, HEADS, HEAD_DIM, VALUE_DIM, RANK = 2, 13, 11, 3, 5, 10, 7


def layer_and_params():
    layer = GatedLinearAttention(
        num_heads=HEADS, head_dim=HEAD_DIM, gate_rank=RANK, gate_temperature=3.0, chunk_size=8
    )
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [x + jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return layer, jax.tree.unflatten(structure, moved)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_definition(params, x):
    """Equations 3 and 4 and section 4.4, head by head and token by token."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    logits = x @ p["decay_down"]["kernel"] @ p["decay_up"]["kernel"] + p["decay_up"]["bias"]
    alpha = sigmoid(logits) ** (1 / 3.0)
    heads = []
    for h in range(HEADS):
        keys = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        values = slice(h * VALUE_DIM, (h + 1) * VALUE_DIM)
        q, k = (x @ p[name]["kernel"][:, keys] for name in "qk")
        v = x @ p["v"]["kernel"][:, values]
        state, out = np.zeros((BATCH, HEAD_DIM, VALUE_DIM)), np.zeros(v.shape)
        for t in range(TIME):
            state = alpha[:, t, keys, None] * state + k[:, t, :, None] * v[:, t, None, :]
            out[:, t] = np.einsum("bk,bkv->bv", q[:, t] / np.sqrt(HEAD_DIM), state)
        mean, variance = out.mean(-1, keepdims=True), out.var(-1, keepdims=True)
        normed = (out - mean) / np.sqrt(variance + 1e-5)
        heads.append(normed * p["norm"]["scale"][h] + p["norm"]["bias"][h])
    gate = x @ p["gate"]["kernel"] + p["gate"]["bias"]
    return (gate * sigmoid(gate) * np.concatenate(heads, axis=-1)) @ p["out"]["kernel"]


def test_values_and_gradients_are_those_of_the_paper():
    """Gradients along one direction of all parameters, by differences of the definition."""
    layer, params = layer_and_params()
    x = jax.random.normal(jax.random.key(2), (BATCH, TIME, WIDTH))
    weight = np.random.default_rng(3).normal(size=(BATCH, TIME, WIDTH))

    def loss(params):
        out, _ = layer.apply({"params": params}, x)
        return jnp.sum(weight * out), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted = by_definition(params, x)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())

    along = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=p.shape), params)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    ends = [
        np.sum(weight * by_definition(jax.tree.map(lambda p, a, s=s: p + s * a, exact, along), x))
        for s in (-1e-6, 1e-6)
    ]
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, a: np.sum(g * a), gradient, along)))
    np.testing.assert_allclose(found, (ends[1] - ends[0]) / 2e-6, rtol=1e-3)
