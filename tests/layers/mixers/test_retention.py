"""Multi-scale retention against the equations of RetNet in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.mixers.retention import MultiScaleRetention

BATCH, TIME, WIDTH, HEADS, HEAD_DIM, VALUE_DIM = 2, 13, 11, 3, 6, 18


def layer_and_params():
    layer = MultiScaleRetention(num_heads=HEADS, head_dim=HEAD_DIM, value_expansion=3, chunk_size=8)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [x + jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return layer, jax.tree.unflatten(structure, moved)


def by_definition(params, x, positions):
    """Head by head and token by token, in complex numbers as the paper writes it."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    # Each pair of channels is a complex number that turns by theta with every position.
    theta = 10_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    heads = []
    for h in range(HEADS):
        keys = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        values = slice(h * VALUE_DIM, (h + 1) * VALUE_DIM)
        q, k = (x @ p[name]["kernel"][:, keys] for name in "qk")
        q, k = (y[..., ::2] + 1j * y[..., 1::2] for y in (q, k))
        v = x @ p["v"]["kernel"][:, values]
        gamma = 1 - 2.0 ** (-5 - h)
        out = np.zeros(v.shape)
        for n in range(x.shape[1]):
            for m in range(n + 1):
                turned = np.exp(1j * theta * (positions[n] - positions[m]))
                product = np.sum(q[:, n] * turned * np.conj(k[:, m]), axis=-1).real
                out[:, n] += gamma ** (n - m) * product[:, None] * v[:, m]
        out = out / np.sqrt(HEAD_DIM)
        mean, variance = out.mean(-1, keepdims=True), out.var(-1, keepdims=True)
        normed = (out - mean) / np.sqrt(variance + 1e-5)
        heads.append(normed * p["norm"]["scale"][h] + p["norm"]["bias"][h])
    gate = x @ p["gate"]["kernel"]
    swish = gate / (1 + np.exp(-gate))
    return (swish * np.concatenate(heads, axis=-1)) @ p["out"]["kernel"]


def test_values_and_gradients_are_those_of_the_paper():
    """Gradients along one direction of all parameters, by differences of the definition."""
    layer, params = layer_and_params()
    x = jax.random.normal(jax.random.key(2), (BATCH, TIME, WIDTH))
    weight = np.random.default_rng(3).normal(size=(BATCH, TIME, WIDTH))
    places = np.arange(TIME)

    def loss(params):
        out, _ = layer.apply({"params": params}, x)
        return jnp.sum(weight * out), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted = by_definition(params, x, places)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())

    along = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=p.shape), params)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    ends = [
        np.sum(
            weight
            * by_definition(jax.tree.map(lambda p, a, s=s: p + s * a, exact, along), x, places)
        )
        for s in (-1e-6, 1e-6)
    ]
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, a: np.sum(g * a), gradient, along)))
    np.testing.assert_allclose(found, (ends[1] - ends[0]) / 2e-6, rtol=1e-3)


def test_given_positions_turn_queries_and_keys_and_are_counted_on_from():
    layer, params = layer_and_params()
    x = jax.random.normal(jax.random.key(2), (BATCH, TIME, WIDTH))
    places = np.array([3, 4, 9, *range(10, 20)])
    given = jnp.tile(jnp.asarray(places[:7]), (BATCH, 1))
    wanted = by_definition(params, x, places)
    state = layer.init_state(BATCH, 0, jnp.float32)

    @jax.jit
    def call(x, positions, state):
        return layer.apply({"params": params}, x, positions, state=state)

    first, state = call(x[:, :7], given, state)
    second, _ = call(x[:, 7:], None, state)
    np.testing.assert_allclose(
        jnp.concatenate([first, second], 1), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )
