"""The layers of the linear attentions, whole, against their equations in NumPy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.ops.feature_maps import gaussian_projection, orthogonal_projection

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 11, 13, 3, 5
SIZES = {"num_heads": HEADS, "head_dim": HEAD_DIM, "chunk_size": 4}


def softmax(x, axis=-1):
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def inputs():
    return np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH))


def applied(name, **fields):
    """The mixer's output, and its parameters in float64, all of them away from zero."""
    mixer = jaxmodels.create_mixer(name, **SIZES, **fields)
    x = jnp.asarray(inputs(), jnp.float32)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape) / s.shape[0] ** 0.5, shapes)
    out, state = jax.jit(mixer.apply)(jax.tree.map(jnp.float32, params), x)
    assert state is None
    return out, params["params"]


def layer(params, mix):
    """Projections in front and behind, and `mix` of one sequence and head between them."""
    x = inputs()

    def project(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    q, k, v = (project(name, x).reshape(BATCH, LENGTH, HEADS, -1) for name in "qkv")
    out = np.zeros_like(v)
    for b, h in np.ndindex(BATCH, HEADS):
        out[b, :, h] = mix(q[b, :, h], k[b, :, h], v[b, :, h])
    return project("out", out.reshape(BATCH, LENGTH, -1))


def weighted(products, v, causal):
    products = np.tril(products) if causal else products
    return products / products.sum(-1, keepdims=True) @ v


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_linear(causal):
    out, params = applied("linear", causal=causal)

    def features(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    expected = layer(params, lambda q, k, v: weighted(features(q) @ features(k).T, v, causal))
    assert_close(out, expected)


def test_linear_with_taylor_features_and_narrow_keys():
    out, params = applied("linear", feature_map="taylor", key_dim=2)

    def mix(q, k, v):
        logits = q @ k.T / 2**0.5
        return weighted(1 + logits + logits**2 / 2, v, causal=True)

    assert params["q"]["kernel"].shape == (WIDTH, 2 * HEADS)
    assert_close(out, layer(params, mix))


def test_efficient():
    out, params = applied("efficient")

    def mix(q, k, v):
        means = np.stack([softmax(k[: t + 1], axis=0).T @ v[: t + 1] for t in range(LENGTH)])
        return np.einsum("tk,tkv->tv", softmax(q), means)

    assert_close(out, layer(params, mix))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_performer_redrawn_by_its_seed(orthogonal):
    draw = orthogonal_projection if orthogonal else gaussian_projection
    outs = []
    for seed in (3, 4):
        fields = {"num_features": 17, "projection_seed": seed, "orthogonal": orthogonal}
        out, params = applied("performer", **fields)
        w = np.asarray(draw(jax.random.key(seed), 17, HEAD_DIM), np.float64)

        def mix(q, k, v, w=w):
            phi_q, phi_k = (
                np.exp(x @ w.T - np.sum(x**2, -1, keepdims=True) / 2)
                for x in (q / HEAD_DIM**0.25, k / HEAD_DIM**0.25)
            )
            return weighted(phi_q @ phi_k.T, v, causal=True)

        assert_close(out, layer(params, mix))
        outs.append(out)
    assert np.abs(outs[0] - outs[1]).max() > 0.01


def test_performer_keeps_no_hidden_state():
    mixer = jaxmodels.create_mixer("performer", **SIZES)
    variables = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
    assert set(variables) == {"params"} and set(variables["params"]) == {"q", "k", "v", "out"}


def test_linformer_takes_the_rows_of_positions():
    out, params = applied("linformer", max_length=19, rank=7)

    def mix(q, k, v):
        e, f = (params[name][:LENGTH] for name in ("key_projection", "value_projection"))
        return softmax(q @ (e.T @ k).T / HEAD_DIM**0.5) @ (f.T @ v)

    assert_close(out, layer(params, mix))


@pytest.mark.parametrize(
    ("name", "fields", "width"),
    [
        ("linear", {}, HEAD_DIM),
        ("linear", {"feature_map": "taylor"}, 1 + HEAD_DIM + 15),
        ("efficient", {}, HEAD_DIM),
        ("performer", {"num_features": 17}, 17),
        ("performer", {"num_features": 17, "kernel": "trigonometric"}, 34),
    ],
)
def test_a_state_has_one_size_and_is_float32(name, fields, width):
    mixer = jaxmodels.create_mixer(name, **SIZES, **fields)
    x = jax.ShapeDtypeStruct((BATCH, 3, WIDTH), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)
    states = [mixer.init_state(BATCH, length, jnp.bfloat16) for length in (8, 16_384)]
    for state in states:
        _, after = jax.eval_shape(lambda p, x, s: mixer.apply(p, x, state=s), params, x, state)
        assert after[0].shape[:3] == (BATCH, HEADS, width)
        assert all(leaf.dtype == jnp.float32 for leaf in after)
    assert jax.tree.map(jnp.shape, states[0]) == jax.tree.map(jnp.shape, states[1])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("linear", {"feature_map": "relu"}, 'feature_map=\'relu\' is neither "elu" nor "taylor"'),
        ("performer", {"kernel": "cosine"}, "kernel='cosine' is unknown"),
        ("linformer", {"causal": True}, "LinformerAttention: causal=True is not defined"),
        (
            "linformer",
            {"max_length": 10},
            "T=11 is longer than max_length=10; .* Set max_length=11",
        ),
    ],
)
def test_bad_input_says_what_to_do(name, fields, message):
    mixer = jaxmodels.create_mixer(name, **SIZES, **fields)
    with pytest.raises(ValueError, match=message):
        mixer.init(jax.random.key(0), jnp.asarray(inputs(), jnp.float32))


def test_linformer_has_no_state():
    mixer = jaxmodels.create_mixer("linformer", **SIZES)
    with pytest.raises(ValueError, match="init_state is not defined, because it is bidirectional"):
        mixer.init_state(BATCH, 16, jnp.float32)
