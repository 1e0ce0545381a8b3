"""Mixtral against `transformers`, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxmodels import create_model
from jaxmodels.models.language.mixtral import Mixtral

BATCH, LENGTH, VOCAB, WIDTH, HIDDEN, EXPERTS, DEPTH = 2, 13, 37, 20, 11, 5, 2


def mixtral(**overrides):
    fields = {
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "mlp_width": HIDDEN,
        "vocab_size": VOCAB,
        "num_experts": EXPERTS,
        "balance_coefficient": 0.25,
    }
    return Mixtral(**{**fields, **overrides})


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_local_experts=EXPERTS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.3,
        # The grouped product takes no width that is prime.
        experts_implementation="eager",
    )
    model = MixtralForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    return model


def tree(model, numbers):
    """Their parameters, or what `numbers` makes of them, as ours."""
    table = {n: jnp.asarray(numbers(w).numpy()) for n, w in model.named_parameters()}

    def kernel(name):
        return {"kernel": table[f"{name}.weight"].T}

    params = {
        "embed": {"embedding": table["model.embed_tokens.weight"]},
        "final_norm": {"scale": table["model.norm.weight"]},
        "head": kernel("lm_head"),
    }
    for i in range(DEPTH):
        layer = f"model.layers.{i}"
        inward = table[f"{layer}.mlp.experts.gate_up_proj"].swapaxes(1, 2)
        gate, up = jnp.split(inward, 2, axis=2)
        mixer = {n: kernel(f"{layer}.self_attn.{n}_proj") for n in "qkv"}
        params[f"block_{i}"] = {
            "mixer_norm": {"scale": table[f"{layer}.input_layernorm.weight"]},
            "mlp_norm": {"scale": table[f"{layer}.post_attention_layernorm.weight"]},
            "mixer": {**mixer, "out": kernel(f"{layer}.self_attn.o_proj")},
            "mlp": {
                "router": kernel(f"{layer}.mlp.gate"),
                "gate": gate,
                "up": up,
                "down": table[f"{layer}.mlp.experts.down_proj"].swapaxes(1, 2),
            },
        }
    return params


def test_equals_transformers_in_loss_logits_and_gradients(theirs):
    """The whole training loss: cross entropy and the mean over layers of balance losses."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1))
    theirs.zero_grad()
    inputs = torch.tensor(tokens[:, :-1])
    out = theirs(inputs, output_router_logits=True)
    entropy = torch.nn.functional.cross_entropy(
        out.logits.reshape(-1, VOCAB), torch.tensor(tokens[:, 1:].ravel())
    )
    balance = sum(load_balancing_loss_func((r,), EXPERTS, 2) for r in out.router_logits) / DEPTH
    want = entropy + 0.25 * balance
    want.backward()
    params = tree(theirs, lambda w: w.detach())
    batch = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
    model = mixtral()

    @jax.jit
    def both(params):
        def loss(params):
            loss, terms, state = model.loss(params, batch, jax.random.key(0))
            return loss, (terms, state)

        logits, _ = model.apply({"params": params}, batch["tokens"])
        return jax.value_and_grad(loss, has_aux=True)(params), logits

    ((loss, (terms, state)), gradient), logits = both(params)
    np.testing.assert_allclose(loss, want.detach(), rtol=1e-5)
    np.testing.assert_allclose(terms["balance"], 0.25 * balance.detach(), rtol=1e-5)
    assert state == {}
    np.testing.assert_allclose(logits, out.logits.detach(), rtol=0, atol=1e-4)

    def near(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    jax.tree.map(near, gradient, tree(theirs, lambda w: w.grad))


def test_streaming_with_a_cache_equals_transformers(theirs):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (BATCH, LENGTH))
    want = theirs(torch.tensor(tokens)).logits.detach()
    model, params = mixtral(), {"params": tree(theirs, lambda w: w.detach())}
    call = jax.jit(lambda tokens, state: model.apply(params, tokens, state=state))
    state, parts = model.init_state(BATCH, LENGTH), []
    for low, high in ((0, 7), (7, 8), (8, LENGTH)):
        part, state = call(jnp.asarray(tokens[:, low:high]), state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, rtol=0, atol=1e-4)


def test_options_reach_the_experts():
    block = mixtral(capacity_factor=1.5, z_coefficient=0.5, top_k=3).feed_forward()
    assert (block.capacity_factor, block.z_coefficient, block.top_k) == (1.5, 0.25, 3)


@pytest.mark.parametrize(
    ("name", "billions", "active"), [("mixtral_8x7b", 46.7, 12.9), ("mixtral_8x22b", 140.6, 39.2)]
)
def test_published_sizes(name, billions, active):
    """Counted from one block, since all are alike."""
    model = create_model(name)
    one = create_model(name, depth=1)
    shapes = jax.eval_shape(one.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    block = shapes.pop("block_0")
    experts = size({n: block["mlp"][n] for n in ("gate", "up", "down")})
    total = size(shapes) + model.depth * size(block)
    assert round(total / 1e9, 1) == billions
    unused = 1 - model.top_k / model.num_experts
    assert round((total - model.depth * unused * experts) / 1e9, 1) == active
