"""The plain decoder against the Llama of `transformers`, and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxmodels.layers.positions import Rotary
from jaxmodels.models.language.decoder import Decoder

BATCH, LENGTH, VOCAB, WIDTH, HIDDEN = 2, 19, 37, 24, 41
HEADS, KV_HEADS, HEAD_DIM, DEPTH = 4, 2, 10, 2
OPTIONS = {
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "position": Rotary(base=500.0),
}


def decoder(**overrides):
    fields = {
        "width": WIDTH,
        "depth": DEPTH,
        "vocab_size": VOCAB,
        "mlp_width": HIDDEN,
        "mixer_options": OPTIONS,
    }
    return Decoder(**{**fields, **overrides})


@pytest.fixture(scope="module")
def llama():
    """Their model with random weights, and ours with the same ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    theirs = LlamaForCausalLM(config).eval()
    for name, weight in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    # Ours has one table, and multiplies by sqrt(D) where it embeds.
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(theirs.lm_head.weight * WIDTH**0.5)
    return theirs, tree(dict(theirs.named_parameters()), lambda weight: weight.detach())


def tree(table, numbers):
    """Their parameters, or what `numbers` makes of them, as ours."""

    def array(name):
        return jnp.asarray(numbers(table[name]).numpy())

    def kernel(name):
        return {"kernel": array(f"{name}.weight").T}

    params = {
        "embed": {"embedding": array("lm_head.weight")},
        "final_norm": {"scale": array("model.norm.weight")},
    }
    for i in range(DEPTH):
        layer = f"model.layers.{i}"
        mixer = {n: kernel(f"{layer}.self_attn.{n}_proj") for n in "qkv"}
        params[f"block_{i}"] = {
            "mixer_norm": {"scale": array(f"{layer}.input_layernorm.weight")},
            "mlp_norm": {"scale": array(f"{layer}.post_attention_layernorm.weight")},
            "mixer": {**mixer, "out": kernel(f"{layer}.self_attn.o_proj")},
            "mlp": {n: kernel(f"{layer}.mlp.{n}_proj") for n in ("gate", "up", "down")},
        }
    return {"params": params}


def test_equals_llama_in_logits_and_gradients(llama):
    theirs, params = llama
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))
    weights = np.random.default_rng(1).normal(size=(BATCH, LENGTH, VOCAB)).astype(np.float32)
    want = theirs(torch.tensor(tokens)).logits
    theirs.zero_grad()
    (want * torch.tensor(weights)).sum().backward()
    want_gradient = tree(dict(theirs.named_parameters()), lambda weight: weight.grad)
    embedded = theirs.model.embed_tokens.weight.grad.numpy() * WIDTH**0.5
    want_gradient["params"]["embed"]["embedding"] += embedded

    def loss(params):
        logits, state = decoder().apply(params, jnp.asarray(tokens))
        assert state is None
        return jnp.sum(logits * weights), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    scale = float(want.detach().abs().max())
    np.testing.assert_allclose(logits, want.detach(), rtol=0, atol=1e-4 * scale)

    def near(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    jax.tree.map(near, gradient, want_gradient)


def test_streaming_with_a_cache_equals_llama(llama):
    theirs, params = llama
    tokens = np.random.default_rng(2).integers(0, VOCAB, (BATCH, LENGTH))
    want = theirs(torch.tensor(tokens)).logits.detach().numpy()
    model = decoder()
    call = jax.jit(lambda tokens, state: model.apply(params, tokens, state=state))
    state, parts = model.init_state(BATCH, LENGTH), []
    for low, high in ((0, 13), (13, 14), (14, LENGTH)):
        part, state = call(jnp.asarray(tokens[:, low:high]), state)
        parts.append(part)
    found = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max())


def sines(positions):
    """Vaswani et al. 2017, section 3.5."""
    angles = positions[:, None] / 10_000 ** (2 * np.arange(WIDTH // 2) / WIDTH)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), WIDTH)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_added_positions_equal_llama_whole_and_streamed(llama, kind):
    theirs, params = llama
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH))
    table = rng.normal(size=(LENGTH, WIDTH)) if kind == "learned" else sines(np.arange(LENGTH))
    added = torch.tensor(table, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(inputs_embeds=theirs.model.embed_tokens(torch.tensor(tokens)) + added).logits
    model = decoder(position_embedding=kind, context=LENGTH)
    if kind == "learned":
        place = {"place": {"embedding": jnp.asarray(table, jnp.float32)}}
        params = {"params": {**params["params"], **place}}
    call = jax.jit(lambda tokens, state: model.apply(params, tokens, state=state))
    near = {"rtol": 0, "atol": 1e-4 * float(want.abs().max())}
    np.testing.assert_allclose(call(jnp.asarray(tokens), None)[0], want, **near)
    state = model.init_state(BATCH, LENGTH)
    for low, high in ((0, 13), (13, 14), (14, LENGTH)):
        part, state = call(jnp.asarray(tokens[:, low:high]), state)
        np.testing.assert_allclose(part, want[:, low:high], **near)


def test_added_positions_begin_anew_in_each_document():
    model = decoder(position_embedding="sinusoidal")
    tokens = jax.random.randint(jax.random.key(0), (1, LENGTH), 0, VOCAB)
    params = model.init(jax.random.key(1), tokens)
    ids = jnp.asarray([[1] * 7 + [2] * (LENGTH - 7)])
    packed, _ = model.apply(params, tokens, segment_ids=ids)
    alone, _ = model.apply(params, tokens[:, 7:])
    np.testing.assert_allclose(packed[:, 7:], alone, rtol=1e-4, atol=1e-5)


def test_bad_position_embeddings_are_named():
    tokens = jnp.zeros((1, 5), jnp.int32)

    def init(**fields):
        model = decoder(**fields)
        model.init(jax.random.key(0), tokens, state=model.init_state(1, 5))

    with pytest.raises(ValueError, match='position_embedding="learned" needs context'):
        init(position_embedding="learned")
    with pytest.raises(ValueError, match="position_embedding='rope' is none of"):
        init(position_embedding="rope")
    fields = {"mixer": "retention", "mixer_options": {"num_heads": 2}}
    with pytest.raises(ValueError, match=r"of mixer='retention' does not say.*pass positions"):
        init(position_embedding="sinusoidal", **fields)


def test_a_mixer_a_layer():
    model = decoder(mixer=("sliding_window", "softmax"), mixer_options=({"window": 3}, OPTIONS))
    tokens = jnp.zeros((1, 5), jnp.int32)
    logits, state = jax.eval_shape(
        lambda: model.init_with_output(
            jax.random.key(0), tokens, state=model.init_state(1, 29, jnp.bfloat16)
        )[0]
    )
    assert logits.shape == (1, 5, VOCAB) and logits.dtype == jnp.float32
    assert [layer.k.shape for layer in state] == [(1, 3, 4, 64), (1, 29, KV_HEADS, HEAD_DIM)]
    assert state[0].k.dtype == jnp.bfloat16


def test_what_is_not_one_a_layer_is_named():
    tokens = jnp.zeros((1, 5), jnp.int32)
    for field, fields in (
        ("mixer", {"mixer": ("softmax",) * 3}),
        ("mixer_options", {"mixer_options": ({},) * 3}),
    ):
        with pytest.raises(ValueError, match=f"Decoder: {field} has 3 entries for depth=2"):
            decoder(**fields).init(jax.random.key(0), tokens)
    with pytest.raises(ValueError, match="Decoder: state has 1 entries for depth=2"):
        decoder().init(jax.random.key(0), tokens, state=decoder().init_state(1, 5)[:1])


def test_starts_near_uniform():
    """At its initial values the model gives about the entropy of a uniform guess."""
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, VOCAB)
    model = decoder()
    logits, _ = model.init_with_output(jax.random.key(1), tokens)[0]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
    assert abs(float(-jnp.mean(picked)) - np.log(VOCAB)) < 1.5


def test_lists_and_dicts_of_options_make_a_hashable_model():
    """Compiled functions take the model as a constant."""
    one, each = decoder(), decoder(mixer=["softmax"] * 2, mixer_options=[dict(OPTIONS)] * 2)
    assert hash(one) == hash(decoder(mixer_options=dict(OPTIONS)))
    assert each == decoder(mixer=("softmax",) * 2, mixer_options=(OPTIONS, OPTIONS))
    assert hash(each) != hash(one)
