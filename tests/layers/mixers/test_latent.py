"""Latent attention against that of `transformers`, with its weights, whole and cached."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from jaxmodels.layers.mixers.latent import LatentMixer
from jaxmodels.layers.positions import Rotary
from jaxmodels.layers.rotary_scaling import DynamicNtk, Yarn

BATCH, TIME, WIDTH, HEADS = 2, 29, 23, 3
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 13, 11, 5, 6, 7
NAMES = {
    "q": "q_proj",
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 7}
STRETCHED = Rotary(base=500.0, layout="interleaved", scaling=Yarn(factor=4.0, train_length=7))


def factor(mscale):
    """What YaRN with a factor of 4 multiplies queries and keys by."""
    return 0.1 * mscale * np.log(4.0) + 1.0


# Their options beside ours. YaRN's factor is on all channels as in DeepSeek-V3 (mscale 1)
# and V2 (below 1), or on the turned ones alone.
CASES = {
    "plain": ({}, {}),
    "no_q_rank": ({"q_lora_rank": None}, {"q_rank": None}),
    "halves": ({"rope_interleave": False}, {"position": Rotary(base=500.0)}),
    "yarn": ({"rope": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, {"position": STRETCHED}),
    "yarn_v2": (
        {"rope": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        {"position": STRETCHED, "scale": factor(0.707) ** 2 / np.sqrt(NOPE + ROPE)},
    ),
    "yarn_turned_alone": (
        {"rope": YARN},
        {"position": STRETCHED, "scale": 1 / np.sqrt(NOPE + ROPE), "magnitude": factor(1.0)},
    ),
}


def mixer(**overrides):
    fields = {
        "num_heads": HEADS,
        "q_rank": Q_RANK,
        "kv_rank": KV_RANK,
        "nope_dim": NOPE,
        "rope_dim": ROPE,
        "value_dim": VALUE,
        "position": Rotary(base=500.0, layout="interleaved"),
    }
    return LatentMixer(**{**fields, **overrides})


def draw(seed):
    return np.random.default_rng(seed).normal(size=(BATCH, TIME, WIDTH)).astype(np.float32)


def tree(module, read):
    """Our tree of numbers from their module: Linear has (out, in), a norm a weight."""
    found = {}
    for ours, theirs in NAMES.items():
        part = getattr(module, theirs, None)
        if part is not None:
            value = jnp.asarray(read(part.weight).numpy().T)
            found[ours] = {"kernel" if value.ndim == 2 else "scale": value}
    return found


@functools.cache
def theirs(case):
    """Outputs, the gradients of x and of the parameters, and the parameters, of a case."""
    options = dict(CASES[case][0])
    rope = {"rope_type": "default", **options.pop("rope", {}), "rope_theta": 500.0}
    config = DeepseekV3Config(
        **{
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "q_lora_rank": Q_RANK,
            "kv_lora_rank": KV_RANK,
            "qk_nope_head_dim": NOPE,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": VALUE,
            "max_position_embeddings": 28,
            "rope_parameters": rope,
            "attn_implementation": "eager",
            **options,
        }
    )
    module = DeepseekV3Attention(config, 0)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.4)
    x = torch.from_numpy(draw(1)).requires_grad_()
    angles = DeepseekV3RotaryEmbedding(config)(x, torch.arange(TIME)[None])
    hidden = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    mask = torch.zeros(TIME, TIME).masked_fill(hidden, -torch.inf)[None, None]
    out = module(x, angles, mask)[0]
    (out * torch.from_numpy(draw(2))).sum().backward()
    gradients = {"x": jnp.asarray(x.grad.numpy()), "params": tree(module, lambda w: w.grad)}
    return out.detach().numpy(), gradients, tree(module, lambda w: w.detach())


def assert_close(actual, expected):
    leaves, _ = jax.tree.flatten_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got / scale, want / scale, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_transformers(case):
    layer = mixer(**CASES[case][1])
    out, gradients, params = theirs(case)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, dict(shapes))

    def loss(params, x):
        found, state = layer.apply({"params": params}, x)
        assert state is None
        return jnp.sum(draw(2) * found), found

    (d_params, d_x), found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, draw(1))
    assert_close(found, out)
    assert_close({"x": d_x, "params": d_params}, gradients)


def absorbs(layer, params, length, room):
    """Whether a call expands no cached token to keys and values of every head."""
    state = layer.init_state(BATCH, room, jnp.float32)
    call = jax.make_jaxpr(lambda x: layer.apply({"params": params}, x, state=state))
    program = str(call(jnp.zeros((BATCH, length, WIDTH))))
    return f"[{BATCH},{room},{HEADS},{NOPE + VALUE}]" not in program


@pytest.mark.parametrize("case", ["plain", "yarn", "yarn_turned_alone"])
def test_cached_is_uncached_absorbed_or_expanded(case):
    """The prompt in one call that expands, then tokens that do not."""
    layer = mixer(**CASES[case][1])
    out, _, params = theirs(case)
    call = jax.jit(lambda x, state: layer.apply({"params": params}, x, state=state))
    state = layer.init_state(BATCH, TIME + 2, jnp.float32)
    ends = (0, 17, 18, 20, TIME)
    assert [absorbs(layer, params, n, TIME + 2) for n in np.diff(ends)] == [False, True, True, True]
    parts = []
    for low, high in itertools.pairwise(ends):
        part, state = call(draw(1)[:, low:high], state)
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1), out)


def test_the_form_is_the_one_with_fewer_multiplications():
    """At DeepSeek-V3's sizes: up to 162 tokens at once with 4,096 of room."""
    layer = LatentMixer(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    maps = 512 * (128 + 128)
    for queries in (1, 163, 164, 4096):
        absorbed = queries * (maps + 4096 * (512 + 64 + 512))
        expanded = 4096 * maps + queries * 4096 * (128 + 64 + 128)
        assert layer._absorb(queries, 4096) == (absorbed < expanded) == (queries < 164)


def test_packed_padding_on_the_left_is_another_document():
    """A prompt of 12 after 5 of padding, cached, is the prompt alone."""
    layer = mixer()
    out, _, params = theirs("plain")
    x = jnp.concatenate([draw(3)[:, :5], draw(1)], axis=1)
    ids = jnp.asarray(np.repeat([[0, 1]] * BATCH, [5, 12], axis=1))
    state = layer.init_state(BATCH, TIME + 5, jnp.float32)
    first, state = layer.apply({"params": params}, x[:, :17], segment_ids=ids, state=state)
    rest, state = layer.apply({"params": params}, x[:, 17:], state=state)
    assert_close(np.concatenate([first[:, 5:], rest], axis=1), out)
    assert int(state.length) == TIME + 5


def test_a_token_costs_its_latent_and_one_rotary_key():
    state = mixer().init_state(BATCH, TIME, jnp.bfloat16)
    assert state.k.shape == (BATCH, TIME, 1, ROPE) and state.v.shape == (BATCH, TIME, 1, KV_RANK)
    assert state.k.dtype == state.v.dtype == jnp.bfloat16


def test_dynamic_scaling_follows_the_length_of_each_document():
    """A packed document is the document alone; it turns otherwise where it is long itself."""
    out, _, params = theirs("plain")
    rotary = Rotary(base=500.0, layout="interleaved", scaling=DynamicNtk(train_length=13))
    x = jnp.concatenate([draw(1)[:, :12], draw(1)], axis=1)
    ids = jnp.asarray(np.repeat([[0, 1]] * BATCH, [12, TIME], axis=1))
    plain, dynamic = (
        layer.apply({"params": params}, x, segment_ids=ids)[0]
        for layer in (mixer(), mixer(position=rotary))
    )
    assert_close(plain, np.concatenate([out[:, :12], out], axis=1))
    assert_close(dynamic[:, :12], out[:, :12])
    assert np.abs(dynamic[:, 12:] - out).max() > 1e-2


def test_log_n_scaling_is_refused():
    layer = mixer(position=Rotary(train_length=16))
    with pytest.raises(ValueError, match=r"LatentMixer: position has train_length=16.*scaling"):
        layer.init(jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
