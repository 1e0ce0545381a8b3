"""Biases by distance against `transformers` and their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from jaxmodels.ops.position_biases import (
    alibi_bias,
    alibi_slopes,
    biased_attention,
    distances,
    kerple_log_bias,
    kerple_power_bias,
    sandwich_bias,
    t5_buckets,
)

B, T, S, H, G, K, V = 2, 7, 11, 6, 3, 5, 13
Q_PLACES = np.sort(np.random.default_rng(0).integers(5, 400, (B, T)), axis=1)
K_PLACES = np.sort(np.random.default_rng(1).integers(0, 400, (B, S)), axis=1)
K_PLACES[:, 3] = Q_PLACES[:, 0]  # the distance 0 occurs
DISTANCE = Q_PLACES[:, :, None] - K_PLACES[:, None, :]
R1 = np.random.default_rng(2).uniform(0.1, 2, H).astype(np.float32)
R2 = np.random.default_rng(3).uniform(0.1, 2, H).astype(np.float32)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def by_loops(function):
    """A (B, H, T, S) array of function(head, distance), in float64."""
    out = np.zeros((B, H, T, S))
    for place in np.ndindex(out.shape):
        b, h, t, s = place
        out[place] = function(h, float(DISTANCE[b, t, s]))
    return out


@pytest.mark.parametrize("heads", [1, 8, 6, 11])
def test_alibi_slopes_equal_bloom(heads):
    expected = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-6)


def test_alibi_bias_equals_mpt():
    """MPT's is that of the last query; all of its keys are earlier."""
    distance = jnp.asarray((S - 1 - np.arange(S))[None, None])
    ours = jax.jit(alibi_bias)(distance, alibi_slopes(8))
    np.testing.assert_allclose(ours[0], build_mpt_alibi_tensor(8, S), rtol=1e-6)
    later = alibi_bias(-distance, alibi_slopes(8))
    np.testing.assert_array_equal(later, ours)


@pytest.mark.parametrize(
    ("function", "definition", "slopes"),
    [
        (
            kerple_log_bias,
            lambda r1, r2, d: -r1 * np.log(1 + r2 * d),
            lambda r1, r2, d: (-np.log(1 + r2 * d), -r1 * d / (1 + r2 * d)),
        ),
        (
            kerple_power_bias,
            lambda r1, r2, d: -r1 * d**r2,
            lambda r1, r2, d: (-(d**r2), -r1 * d**r2 * np.log(max(d, 1e-300)) if d else 0.0),
        ),
    ],
    ids=["log", "power"],
)
def test_kerple_by_definition(function, definition, slopes):
    """Values, and the derivatives by r1 and r2, also at distance 0."""

    @jax.jit
    def both(r1, r2):
        bias, pull = jax.vjp(lambda *r: function(jnp.asarray(DISTANCE), *r), r1, r2)
        return bias, pull(jnp.ones_like(bias))

    bias, gradients = both(jnp.asarray(R1), jnp.asarray(R2))
    np.testing.assert_allclose(
        bias, by_loops(lambda h, d: definition(float(R1[h]), float(R2[h]), abs(d))), rtol=1e-4
    )
    for i, mine in enumerate(gradients):
        each = by_loops(lambda h, d, i=i: slopes(float(R1[h]), float(R2[h]), abs(d))[i])
        np.testing.assert_allclose(mine, each.sum(axis=(0, 2, 3)), rtol=1e-4)


def test_sandwich_by_definition():
    def definition(h, d):
        waves = [np.cos(d / 10_000.0 ** (2 * i / 26)) for i in range(1, 14)]
        return (sum(waves) - 13) / (8 * (h + 1) / H)

    ours = jax.jit(lambda t, s: sandwich_bias(t, s, H, width=26))(Q_PLACES, K_PLACES)
    np.testing.assert_allclose(ours, by_loops(definition), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("number", "furthest"), [(32, 128), (14, 50)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_equal_transformers(bidirectional, number, furthest):
    distance = np.arange(-1_200, 1_201)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(-distance), bidirectional, number, furthest
    )
    ours = jax.jit(
        lambda d: t5_buckets(
            d, bidirectional=bidirectional, num_buckets=number, max_distance=furthest
        )
    )(distance[None])
    np.testing.assert_array_equal(ours[0], theirs)


def test_biased_attention_equals_torch():
    """Values and gradients, those of the bias' own parameters too."""
    q, k, v = draw(0, B, T, H, K), draw(1, B, S, G, K), draw(2, B, S, G, V)
    d_out, places = draw(3, B, T, H, V), (jnp.asarray(Q_PLACES), jnp.asarray(K_PLACES))

    def attend(q, k, v, r1):
        def bias(*places):
            return kerple_log_bias(distances(*places), r1, jnp.asarray(R2))

        return biased_attention(q, k, v, *places, bias, causal=True, block_size=3)

    @jax.jit
    def both(*arguments):
        out, pull = jax.vjp(attend, *arguments)
        return out, pull(d_out)

    arguments = (q, k, v, jnp.asarray(R1))
    out, gradients = both(*arguments)
    q, k, v, r1 = (
        torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in arguments
    )
    far = torch.tensor(np.abs(DISTANCE)[:, None] * R2.astype(np.float64)[:, None, None])
    bias = -r1[:, None, None] * torch.log1p(far)
    hidden = torch.ones(T, S, dtype=bool).triu(S - T + 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=bias.masked_fill(hidden, -torch.inf),
        enable_gqa=True,
    ).transpose(1, 2)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward(torch.tensor(np.asarray(d_out), dtype=torch.float64))
    for mine, x in zip(gradients, (q, k, v, r1), strict=True):
        np.testing.assert_allclose(mine, x.grad, rtol=1e-4, atol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="sandwich_bias: width=5 must be a positive even"):
        sandwich_bias(jnp.zeros((1, 2), int), jnp.zeros((1, 3), int), H, width=5)
    for number, furthest in ((3, 128), (32, 7)):
        with pytest.raises(ValueError, match=f"t5_buckets: num_buckets={number} and max_dist"):
            t5_buckets(
                jnp.zeros((1, 1), int),
                bidirectional=True,
                num_buckets=number,
                max_distance=furthest,
            )
