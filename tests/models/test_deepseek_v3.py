"""DeepSeek-V3 against that of `transformers` with its weights, modules that look ahead included."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from models.deepseek_v3_pair import (
    AHEAD,
    BATCH,
    DEPTH,
    LENGTH,
    WEIGHT,
    WIDTH,
    draw,
    ours,
    their_hidden,
    theirs,
    tree,
    variables,
)
from transformers import DeepseekV3Config

from jaxmodels import create_model, training

# What the training step reports of any loss.
COMMON = ("loss", "grad_norm", "first_nonfinite")


def assert_close(actual, expected, tolerance=1e-4):
    leaves, _ = jax.tree.flatten_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        scale = max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(
            got / scale, want / scale, rtol=0, atol=tolerance, err_msg=str(path)
        )


def test_parameters_and_state_are_named_as_documented():
    model = ours()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert {*shapes} == {"params", "router"}
    found = jax.tree.map(lambda x: x.shape, jax.tree.map(jnp.asarray, variables()))
    assert jax.tree.map(lambda x: x.shape, dict(shapes)) == found


def test_logits_and_those_of_the_modules():
    """At positions with gaps, which matter to every block."""
    tokens = draw(LENGTH)
    with torch.no_grad():
        rows = [their_hidden(torch.from_numpy(row[None]), stride=3) for row in tokens]
        want = [
            np.concatenate([theirs().lm_head(row[k]).numpy() for row in rows])
            for k in range(AHEAD + 1)
        ]
    model = ours()
    places = jnp.broadcast_to(3 * jnp.arange(LENGTH), tokens.shape)

    @jax.jit
    def run(variables, tokens):
        hidden = model.apply(variables, tokens, places, method="hidden_ahead")
        ahead = [model.apply(variables, h, method="logits") for h in hidden]
        return model.apply(variables, tokens, places)[0], ahead

    found, ahead = run(variables(), jnp.asarray(tokens))
    assert found.dtype == jnp.float32
    assert_close((found, ahead), (want[0], want))


# Inputs of the documents in each row; their targets follow them.
LAYOUTS = {"whole": (LENGTH,), "packed": (6, 1, 2, 10)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_training_loss_and_its_gradients(layout):
    """Equations 24 and 25: each document alone, summed in torch; weights of the targets."""
    lengths = LAYOUTS[layout]
    texts = draw(LENGTH + len(lengths))
    target_weights = np.random.default_rng(2).choice([0.0, 1.0, 1.5], (BATCH, LENGTH))
    target_weights = target_weights.astype(np.float32) if layout != "whole" else None
    batch, ends = {"tokens": [], "targets": []}, np.cumsum(lengths)
    model = theirs()
    model.zero_grad()
    sums, counts = torch.zeros(AHEAD + 1), torch.zeros(AHEAD + 1)
    for row, text in enumerate(texts):
        parts = np.split(text, np.cumsum(np.add(lengths, 1))[:-1])
        batch["tokens"].append(np.concatenate([part[:-1] for part in parts]))
        batch["targets"].append(np.concatenate([part[1:] for part in parts]))
        for part, end, length in zip(parts, ends, lengths, strict=True):
            weights = torch.ones(length)
            if target_weights is not None:
                weights = torch.from_numpy(target_weights[row, end - length : end])
            part = torch.from_numpy(part[None])
            for k, hidden in enumerate(their_hidden(part[:, :-1])):
                lost = torch.nn.functional.cross_entropy(
                    model.lm_head(hidden)[0], part[0, k + 1 :], reduction="none"
                )
                here = torch.arange(AHEAD + 1) == k
                sums = sums + here * (weights[k:] * lost).sum()
                counts = counts + here * weights[k:].sum()
    means = sums / counts
    want = means[0] + WEIGHT / AHEAD * means[1:].sum()
    want.backward()

    batch = {key: jnp.asarray(np.stack(rows), jnp.int32) for key, rows in batch.items()}
    if layout != "whole":
        # The same id again is another document, when another one stands between.
        ids = np.repeat(np.arange(len(lengths)) % 2, lengths)
        batch["segment_ids"] = jnp.asarray(np.stack([ids] * BATCH), jnp.int32)
        batch["weights"] = jnp.asarray(target_weights)
    start = variables()

    @jax.jit
    def run(params):
        def loss(params):
            loss, *rest = ours().loss(params, batch, jax.random.key(0), {"router": start["router"]})
            return loss, rest

        return jax.value_and_grad(loss, has_aux=True)(params)

    (found, (terms, _)), gradients = run(start["params"])
    np.testing.assert_allclose(found, want.detach(), rtol=1e-5)
    names = ["cross_entropy", *(f"cross_entropy_{k}" for k in range(2, AHEAD + 2))]
    np.testing.assert_allclose([terms[n] for n in names], means.detach(), rtol=1e-5)
    assert_close(gradients, tree(model, lambda weight: weight.grad))


def test_cached_is_uncached():
    """The model and a module over it, fed the prompt and then token by token."""
    model, tokens = ours(), jnp.asarray(draw())
    with torch.no_grad():
        rows = [their_hidden(torch.from_numpy(row[None, :-1])) for row in draw()]
        want = [np.concatenate([row[k].numpy() for row in rows]) for k in range(AHEAD + 1)]

    @jax.jit
    def call(tokens, after, states):
        start = variables()
        state, ahead = states
        hidden, state = model.apply(start, tokens, state=state, method="hidden")
        found, ahead = model.apply(start, hidden, after, 0, state=ahead, method="predict_ahead")
        return hidden, found, (state, ahead)

    states = model.init_state(BATCH, LENGTH), model.init_ahead_state(BATCH, LENGTH)[0]
    assert len(states[0]) == DEPTH and len(model.init_ahead_state(BATCH, LENGTH)) == AHEAD
    parts = []
    for low, high in itertools.pairwise((0, 17, 18, LENGTH)):
        *part, states = call(tokens[:, low:high], tokens[:, low + 1 : high + 1], states)
        parts.append(part)
    hidden, ahead = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    assert_close((hidden, ahead[:, :-1]), tuple(want[:2]))


def test_training_lowers_the_loss_and_moves_the_biases():
    """In the package's own step, whose model_state the biases are."""
    model = ours(num_ahead=1, balance_coefficient=0.01, bias_rate=0.05, norm_eps=1e-6)
    batch = {"tokens": jnp.asarray(draw()[:, :-1]), "targets": jnp.asarray(draw()[:, 1:])}
    optimizer = optax.adam(1e-2)
    example = {"tokens": batch["tokens"]}
    state = training.init_state(model, optimizer, jax.random.key(0), example)
    assert {*state.model_state} == {"router"}
    before = jax.tree.map(np.asarray, state.model_state)
    step = training.make_step(model.loss, optimizer)
    state, first = step(state, batch)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.model_state)
    np.testing.assert_allclose(jax.tree.leaves(moved), [0.05, 0.05], rtol=1e-6)
    names = ("cross_entropy", "cross_entropy_2")
    sown = sum(first[name] for name in {*first} - {*names, *COMMON})
    parts = (first[names[0]], WEIGHT * first[names[1]], sown)
    assert min(parts) > 0
    np.testing.assert_allclose(first["loss"], sum(parts), rtol=1e-5)
    for _ in range(5):
        state, last = step(state, batch)
    for name in names:
        assert last[name] < 0.9 * first[name]


def test_without_modules_the_loss_is_the_models():
    model = ours(num_ahead=0)
    start = jax.tree.map(jnp.asarray, variables())
    params = {name: value for name, value in start["params"].items() if "ahead" not in name}
    router = {name: value for name, value in start["router"].items() if "ahead" not in name}
    batch = {"tokens": jnp.asarray(draw()[:, :-1]), "targets": jnp.asarray(draw()[:, 1:])}
    loss, terms, _ = jax.jit(functools.partial(model.loss, z_loss=0.1))(
        params, batch, jax.random.key(0), {"router": router}
    )
    with torch.no_grad():
        logits = theirs()(torch.from_numpy(draw()[:, :-1])).logits.flatten(0, 1)
        want = torch.nn.functional.cross_entropy(logits, torch.from_numpy(draw()[:, 1:]).flatten())
        want = want + 0.1 * logits.logsumexp(-1).square().mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert "cross_entropy" in terms and "cross_entropy_2" not in terms


def test_options_of_the_attention_reach_every_layer():
    options = {"attention_scale": 0.7, "rope_magnitude": 1.3, "rope_layout": "half"}
    for mixer in ours(**options).mixers():
        assert (mixer.scale, mixer.magnitude, mixer.position.layout) == (0.7, 1.3, "half")


def test_a_tied_table_is_the_output_matrix():
    model = ours(tied=True)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert "head" not in params and "head" in variables()["params"]
    table = variables()["params"]["embed"]["embedding"]
    np.testing.assert_array_equal(model.output_kernel({"embed": {"embedding": table}}), table.T)


def test_the_published_size():
    """The sizes are those of their configuration, which come to 671 billion parameters."""
    model, config = create_model("deepseek_v3"), DeepseekV3Config()
    sizes = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "dense_depth": "first_k_dense_replace",
        "num_heads": "num_attention_heads",
        "q_rank": "q_lora_rank",
        "kv_rank": "kv_lora_rank",
        "nope_dim": "qk_nope_head_dim",
        "rope_dim": "qk_rope_head_dim",
        "value_dim": "v_head_dim",
        "mlp_width": "intermediate_size",
        "expert_width": "moe_intermediate_size",
        "num_experts": "n_routed_experts",
        "num_shared": "n_shared_experts",
        "top_k": "num_experts_per_tok",
        "groups": "n_group",
        "top_groups": "topk_group",
        "routed_scale": "routed_scaling_factor",
        "num_ahead": "num_mtp_layers",
        "norm_eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    }
    for field, entry in sizes.items():
        assert getattr(model, field) == getattr(config, entry), field

    def count(depth):
        shapes = jax.eval_shape(
            model.clone(num_ahead=0, depth=depth).init, jax.random.key(0), jnp.zeros((1, 2), int)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    dense = count(3)
    assert round((dense + 58 * (count(4) - dense)) / 1e9) == 671


def test_bad_input_is_named():
    model = ours()
    with pytest.raises(ValueError, match=r"sequences of 2 tokens.*num_ahead=2"):
        model.apply(variables(), jnp.zeros((1, 2), jnp.int32), method="hidden_ahead")
    hidden, tokens = jnp.zeros((1, 3, WIDTH)), jnp.zeros((1, 3), jnp.int32)
    for number in (-1, AHEAD):
        with pytest.raises(ValueError, match=rf"number={number} and the model num_ahead=2"):
            model.apply(variables(), hidden, tokens, number, method="predict_ahead")
    batch = {"tokens": tokens, "targets": tokens[:, 1:]}
    with pytest.raises(ValueError, match=r"DeepseekV3: batch\['tokens'\] is \(1, 3\)"):
        model.loss(variables()["params"], batch, jax.random.key(0))
