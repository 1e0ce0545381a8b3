"""The layer against the equations of the HGRN2 paper in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.layers.mixers.hgrn2 import Hgrn2

BATCH, TIME, WIDTH, HEADS, HEAD_DIM = 2, 13, 11, 3, 5


def layer_and_params(lower_bound):
    layer = Hgrn2(num_heads=HEADS, head_dim=HEAD_DIM, lower_bound=lower_bound, chunk_size=8)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [x + jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return layer, jax.tree.unflatten(structure, moved)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_definition(params, x, lower_bound):
    """h_t = diag(f_t) h_(t-1) + (1 - f_t) i_t^T read by o_t, head by head, token by token."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    heads = []
    for h in range(HEADS):
        part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        forget, value, output = (
            x @ p[name]["kernel"][:, part] for name in ("forget", "input", "output")
        )
        f = lower_bound + (1 - lower_bound) * sigmoid(forget)
        o = output * sigmoid(output)
        state, out = np.zeros((BATCH, HEAD_DIM, HEAD_DIM)), np.zeros(value.shape)
        for t in range(TIME):
            state = f[:, t, :, None] * state + (1 - f[:, t])[:, :, None] * value[:, t, None, :]
            out[:, t] = np.einsum("bk,bkv->bv", o[:, t], state)
        heads.append(out)
    out = np.concatenate(heads, axis=-1)
    out = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    return out @ p["out"]["kernel"]


@pytest.mark.parametrize("lower_bound", [0.0, 0.7])
def test_values_and_gradients_are_those_of_the_paper(lower_bound):
    """Gradients along one direction of all parameters, by differences of the definition."""
    layer, params = layer_and_params(lower_bound)
    x = jax.random.normal(jax.random.key(2), (BATCH, TIME, WIDTH))
    weight = np.random.default_rng(3).normal(size=(BATCH, TIME, WIDTH))

    def loss(params):
        out, _ = layer.apply({"params": params}, x)
        return jnp.sum(weight * out), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted = by_definition(params, x, lower_bound)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())

    along = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=p.shape), params)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    ends = [
        np.sum(
            weight
            * by_definition(jax.tree.map(lambda p, a, s=s: p + s * a, exact, along), x, lower_bound)
        )
        for s in (-1e-6, 1e-6)
    ]
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, a: np.sum(g * a), gradient, along)))
    np.testing.assert_allclose(found, (ends[1] - ends[0]) / 2e-6, rtol=1e-3)


def test_gates_that_are_shut_or_open_keep_values_and_gradients_finite():
    layer, params = layer_and_params(0.0)
    params["forget"]["kernel"] = 1e4 * params["forget"]["kernel"]
    x = jax.random.normal(jax.random.key(2), (BATCH, TIME, WIDTH))
    run = jax.jit(jax.value_and_grad(lambda p: jnp.sum(layer.apply({"params": p}, x)[0] ** 2)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(run(params)))


@pytest.mark.parametrize("bound", [-0.1, 1.0])
def test_a_lower_bound_that_is_none_is_named(bound):
    with pytest.raises(ValueError, match=rf"Hgrn2: lower_bound holds {bound:g}, outside"):
        Hgrn2(lower_bound=bound).init(jax.random.key(0), jnp.zeros((1, 1, 8)))
