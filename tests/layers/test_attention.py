"""The layer against attention modules of transformers and torch, with their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3Config, T5Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.t5.modeling_t5 import T5Attention

from jaxmodels.layers import Attention
from jaxmodels.layers.attention import t5_initializers

BATCH, TIME, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 2, 13, 42, 6, 2, 4


def randomized(module, seed=0):
    """Weights of a size at which every one of them matters."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.5)
    return module.eval()


def parameters_of(module, names, read=lambda x: x):
    """Our tree from the torch module; `names` maps our module names to theirs."""
    tree = {}
    for ours, theirs in names.items():
        tree[ours] = {}
        for key, value in module.get_submodule(theirs).named_parameters():
            value = read(value)
            # Linear has (out, in); a norm's weight is called scale here.
            key = {1: "bias" if key == "bias" else "scale", 2: "kernel"}[value.ndim]
            tree[ours][key] = jnp.asarray(value.detach().numpy().T)
    return tree


def compare(layer, module, call, names, **arguments):
    """Outputs and the gradients of the input and of all parameters."""
    rng = np.random.default_rng(1)
    x, weight = (rng.normal(size=(BATCH, TIME, WIDTH)).astype(np.float32) for _ in range(2))
    their_x = torch.from_numpy(x).requires_grad_()
    their_out = call(module, their_x)
    (their_out * torch.from_numpy(weight)).sum().backward()

    def loss(params, x):
        out = layer.apply({"params": params}, x, **arguments)
        return jnp.sum(weight * out), out

    params = parameters_of(module, names)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, dict(layer.init(jax.random.key(0), jnp.asarray(x), **arguments)["params"])
    )
    (d_params, d_x), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        params, jnp.asarray(x)
    )
    expected = {
        "out": jnp.asarray(their_out.detach().numpy()),
        "x": jnp.asarray(their_x.grad.numpy()),
        "params": parameters_of(module, names, lambda p: p.grad),
    }
    actual = {"out": out, "x": d_x, "params": d_params}
    leaves, _ = jax.tree.flatten_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(
            got, want, rtol=1e-4, atol=1e-4 * max(1.0, abs(want).max()), err_msg=str(path)
        )


PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "attn_implementation": "eager",
}


def without_rotation(module, x):
    """Llama's modules with rotary embeddings of angle zero, and a causal mask."""
    ones = torch.ones(BATCH, TIME, HEAD_DIM)
    hidden = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    mask = torch.zeros(TIME, TIME).masked_fill(hidden, -torch.inf)[None, None]
    return module(x, (ones, 0 * ones), mask)[0]


@pytest.mark.parametrize("use_bias", [False, True])
def test_matches_llama(use_bias):
    module = randomized(LlamaAttention(LlamaConfig(**SIZES, attention_bias=use_bias), 0))
    layer = Attention(HEADS, KV_HEADS, HEAD_DIM, use_bias=use_bias, causal=True)
    compare(layer, module, without_rotation, PROJECTIONS)


def test_matches_qwen3_with_its_norm_of_queries_and_keys():
    config = Qwen3Config(**SIZES, rms_norm_eps=1e-2)
    module = randomized(Qwen3Attention(config, 0))
    layer = Attention(
        HEADS, KV_HEADS, HEAD_DIM, use_bias=False, qk_norm="rms", norm_eps=1e-2, causal=True
    )
    names = PROJECTIONS | {"q_norm": "q_norm", "k_norm": "k_norm"}
    compare(layer, module, without_rotation, names)


def test_matches_qwen3_with_layer_norms_instead():
    module = Qwen3Attention(Qwen3Config(**SIZES), 0)
    module.q_norm = torch.nn.LayerNorm(HEAD_DIM, eps=1e-2)
    module.k_norm = torch.nn.LayerNorm(HEAD_DIM, eps=1e-2)
    layer = Attention(
        HEADS, KV_HEADS, HEAD_DIM, use_bias=False, qk_norm="layer", norm_eps=1e-2, causal=True
    )
    names = PROJECTIONS | {"q_norm": "q_norm", "k_norm": "k_norm"}
    compare(layer, randomized(module), without_rotation, names)


def test_matches_t5_unscaled_with_relative_bias():
    config = T5Config(d_model=WIDTH, d_kv=HEAD_DIM, num_heads=HEADS, dropout_rate=0.0)
    module = T5Attention(config, has_relative_attention_bias=True)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    bias = jnp.asarray(module.compute_bias(TIME, TIME).detach().numpy())
    layer = Attention(HEADS, head_dim=HEAD_DIM, use_bias=False, scale=1.0)
    names = {"q": "q", "k": "k", "v": "v", "out": "o"}
    compare(layer, module.eval(), lambda m, x: m(x)[0], names, bias=bias)


def init(layer, width=WIDTH):
    return layer.init(jax.random.key(0), jnp.ones((BATCH, TIME, width)))["params"]


def test_options_reach_the_operation():
    """Sinks, soft-cap, window, mask and segments each change the output as they must."""
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
    layer = Attention(7, sinks=True)
    params = init(layer)
    assert params["sinks"].shape == (7,)
    values = layer.apply({"params": params}, x)
    # An overwhelming sink leaves only the output's bias.
    drained = layer.apply({"params": params | {"sinks": jnp.full((7,), 1e4)}}, x)
    np.testing.assert_allclose(drained, jnp.zeros_like(drained), atol=1e-6)
    assert np.abs(values).max() > 0.1
    plain = Attention(7)
    # Who sees only itself, by window, mask or segment, mixes nothing.
    alone = Attention(7, window=0).apply({"params": init(plain)}, x)
    by_mask = plain.apply({"params": init(plain)}, x, mask=jnp.eye(TIME, dtype=bool))
    ids = jnp.tile(jnp.arange(TIME), (BATCH, 1))
    by_segment = plain.apply({"params": init(plain)}, x, segment_ids=ids)
    every = plain.apply({"params": init(plain)}, x)
    assert np.abs(every - alone).max() > 0.1
    np.testing.assert_allclose(by_mask, alone, atol=1e-5)
    np.testing.assert_allclose(by_segment, alone, atol=1e-5)
    # A tiny soft-cap makes all logits equal: the mean over time.
    flat = Attention(7, softcap=1e-6).apply({"params": init(plain)}, x)
    np.testing.assert_allclose(flat, jnp.broadcast_to(flat[:, :1], flat.shape), atol=1e-5)


def test_t5_initialisation_gives_logits_of_variance_one():
    """Without a scale; the usual one, LeCun's with 1 / sqrt(K), is the other way there."""
    width, heads, head_dim = 512, 8, 64
    layer = Attention(
        heads,
        head_dim=head_dim,
        use_bias=False,
        scale=1.0,
        **t5_initializers(width, heads, head_dim),
    )
    params = init(layer, width)
    x = np.asarray(jax.random.normal(jax.random.key(1), (211, width)), np.float64)
    q, k, v = (
        (x @ np.asarray(params[n]["kernel"], np.float64)).reshape(211, heads, head_dim)
        for n in "qkv"
    )
    logits = np.einsum("thk,shk->hts", q, k)
    assert 0.9 < logits[:, ~np.eye(211, dtype=bool)].var() < 1.1
    assert 0.95 < v.var() < 1.05
    out = v.reshape(211, -1) @ np.asarray(params["out"]["kernel"], np.float64)
    assert 0.95 < out.var() < 1.05


def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32():
    layer = Attention(7, dtype=jnp.bfloat16, qk_norm="rms")
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
    params = init(layer)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = layer.apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    exact = Attention(7, qk_norm="rms").apply({"params": params}, x)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "layer, message",
    [
        (Attention(5), "num_heads=5 does not divide the width 42; choose a divisor or give"),
        (Attention(6, 4, 4), "6 query heads are no multiple of 4"),
    ],
)
def test_bad_sizes_are_named(layer, message):
    with pytest.raises(ValueError, match=message):
        init(layer)


def test_an_unknown_norm_is_named():
    with pytest.raises(ValueError, match='qk_norm=\'batch\' is neither "rms" nor "layer"'):
        init(Attention(7, qk_norm="batch"))
