"""Schemes with a bias against dense attention of torch with the bias written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from jaxmodels.layers.position_biases import Alibi, Kerple, Sandwich, T5Bias

B, T, H, K, V = 2, 11, 3, 5, 7
PLACES = jnp.broadcast_to(jnp.arange(T), (B, T))
DISTANCE = np.abs(np.arange(T)[:, None] - np.arange(T)).astype(np.float64)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


Q, KEYS, VALUES = (draw(i, B, T, H, n) for i, n in enumerate((K, K, V)))


def theirs(bias, causal=True):
    bias = torch.tensor(np.asarray(bias, np.float64))
    if causal:
        bias = bias.masked_fill(torch.ones(T, T, dtype=bool).triu(1), -torch.inf)
    q, k, v = (torch.tensor(np.asarray(x, np.float64)).transpose(1, 2) for x in (Q, KEYS, VALUES))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=bias).transpose(1, 2).numpy()


def check(out, bias, causal=True):
    np.testing.assert_allclose(out, theirs(bias, causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_equals_bloom(causal):
    slopes = build_alibi_tensor(torch.ones(1, 2), H, torch.float32)[:, 0, 1].numpy()
    out = Alibi().attend(Q, KEYS, VALUES, PLACES + 900, PLACES + 900, causal=causal)
    check(out, -slopes[:, None, None] * DISTANCE, causal)


def test_alibi_with_sinks():
    """A sink is not shifted with the other logits; one far below them all changes nothing."""
    arguments = (Q, KEYS, VALUES, PLACES, PLACES)
    plain = Alibi().attend(*arguments, causal=True)
    low = Alibi().attend(*arguments, causal=True, sinks=jnp.full(H, -50.0))
    np.testing.assert_allclose(low, plain, rtol=1e-4, atol=1e-5)
    # The first query sees one key; a sink as high as its logit halves the value.
    sinks = jnp.einsum("hk,hk->h", Q[0, 0], KEYS[0, 0]) / K**0.5
    halved = Alibi().attend(*arguments, causal=True, sinks=sinks)
    np.testing.assert_allclose(halved[0, 0], VALUES[0, 0] / 2, rtol=1e-4, atol=1e-5)


def test_sandwich():
    waves = sum(np.cos(DISTANCE / 10_000.0 ** (2 * i / 22)) for i in range(1, 12)) - 11
    bias = np.stack([waves * H / (8 * h) for h in range(1, H + 1)])
    check(Sandwich(22).attend(Q, KEYS, VALUES, PLACES, PLACES, causal=True), bias)


@pytest.mark.parametrize("kernel", ["log", "power"])
def test_kerple_starts_as_published_and_clips(kernel):
    layer = Kerple(kernel)
    arguments = (Q, KEYS, VALUES, PLACES, PLACES)
    params = layer.init(jax.random.key(0), *arguments, causal=True, method="attend")["params"]
    assert {name: x.shape for name, x in params.items()} == {"r1": (H,), "r2": (H,)}
    r1, r2 = np.array([0.7, -1.0, 1.3]), np.array([-0.1, 0.4, 2.5])
    params = {"r1": jnp.asarray(r1, jnp.float32), "r2": jnp.asarray(r2, jnp.float32)}
    out = layer.apply({"params": params}, *arguments, causal=True, method="attend")
    r1, r2 = (np.maximum(r, 0.01)[:, None, None] for r in (r1, r2))
    log = -r1 * np.log(1 + r2 * DISTANCE)
    check(out, log if kernel == "log" else -r1 * DISTANCE ** np.minimum(r2, 2.0))


def test_kerple_initialisation_is_uniform():
    wide = jnp.zeros((1, 2, 4_000, 1))
    places = jnp.zeros((1, 2), int)
    for kernel, high1, high2 in (("log", 2, 1), ("power", 1, 2)):
        params = Kerple(kernel).init(
            jax.random.key(0), wide, wide, wide, places, places, method="attend"
        )["params"]
        for name, high in (("r1", high1), ("r2", high2)):
            low, middle, top = np.quantile(params[name], [0, 0.5, 1])
            assert low >= 0 and top <= high and abs(middle - high / 2) < 0.05 * high


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_equals_transformers(bidirectional):
    torch.manual_seed(0)
    config = T5Config(
        d_model=H * K, d_kv=K, num_heads=H, relative_attention_num_buckets=8,
        relative_attention_max_distance=9, is_decoder=not bidirectional,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    bias = theirs.compute_bias(T, T)[0].detach().numpy()
    table = jnp.asarray(theirs.relative_attention_bias.weight.detach().numpy())
    out = T5Bias(bidirectional, 8, 9).apply(
        {"params": {"table": table}},
        Q,
        KEYS,
        VALUES,
        PLACES,
        PLACES,
        causal=not bidirectional,
        method="attend",
    )
    check(out, bias, not bidirectional)


def test_bad_kernel():
    with pytest.raises(ValueError, match="Kerple: kernel='square' is none of"):
        Kerple("square").init(jax.random.key(0), Q, KEYS, VALUES, PLACES, PLACES, method="attend")
