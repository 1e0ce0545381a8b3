"""Mixtures of experts against the blocks of Mixtral and DeepSeek-V3 in `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from jaxmodels import training
from jaxmodels.layers.experts import MixtureOfExperts
from jaxmodels.ops import routing

EXPERTS, WIDTH, HIDDEN = 6, 7, 11


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=1,
    )
    layer = MixtureOfExperts(num_experts=EXPERTS, top_k=2, hidden_width=HIDDEN)
    return layer, MixtralSparseMoeBlock(config)


def deepseek():
    config = transformers.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_shared_experts=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    layer = MixtureOfExperts(
        num_experts=EXPERTS,
        top_k=2,
        hidden_width=HIDDEN,
        scores="sigmoid",
        groups=3,
        top_groups=2,
        scale=2.5,
        shared_width=2 * HIDDEN,
        bias_rate=0.125,
    )
    return layer, DeepseekV3MoE(config)


def params_of(block, numbers=lambda p: p.detach()):
    """The tree of ours that holds the numbers of theirs."""

    def kernel(weight):
        return jnp.asarray(numbers(weight).numpy().T)

    gate, up = np.split(numbers(block.experts.gate_up_proj).numpy().swapaxes(1, 2), 2, axis=2)
    tree = {
        "router": {"kernel": kernel(block.gate.weight)},
        "gate": jnp.asarray(gate),
        "up": jnp.asarray(up),
        "down": jnp.asarray(numbers(block.experts.down_proj).numpy().swapaxes(1, 2)),
    }
    if hasattr(block, "shared_experts"):
        shared = block.shared_experts
        tree["shared"] = {
            name: {"kernel": kernel(getattr(shared, f"{name}_proj").weight)}
            for name in ("gate", "up", "down")
        }
    return tree


@pytest.mark.parametrize("pair", [mixtral, deepseek])
def test_equals_transformers_in_values_and_gradients(pair):
    layer, block = pair()
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    state = {}
    if pair is deepseek:
        torch.nn.init.normal_(block.gate.e_score_correction_bias)
        state = {"router": {"router": {"bias": jnp.asarray(block.gate.e_score_correction_bias)}}}
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 3, 13, WIDTH)).astype(np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    expected = block(theirs)
    expected.backward(torch.tensor(cotangent))

    @jax.jit
    def both(params, x):
        def call(params, x):
            return layer.apply({"params": params, **state}, x)

        out, pull_back = jax.vjp(call, params, x)
        return out, *pull_back(cotangent)

    out, of_params, of_x = both(params_of(block), x)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, theirs.grad, rtol=1e-5, atol=1e-5)
    wanted = params_of(block, lambda p: p.grad)
    assert jax.tree.structure(wanted) == jax.tree.structure(of_params)
    for (path, want), found in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(of_params), strict=True
    ):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=3e-5, err_msg=str(path))


def built(**fields):
    layer = MixtureOfExperts(
        **{"num_experts": EXPERTS, "top_k": 2, "hidden_width": HIDDEN, **fields}
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, WIDTH)), jnp.float32)
    return layer, jax.jit(layer.init)(jax.random.key(0), x), x


def by_the_definition(variables, x, choose):
    """`choose(scores (N, E))` gives the (N, E) weights, 0 for experts that do not see a token."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x = np.asarray(x, np.float64).reshape(-1, WIDTH)
    scores = np.exp(x @ p["router"]["kernel"])
    weights = choose(scores / scores.sum(-1, keepdims=True))
    out = np.zeros_like(x)
    for e in range(EXPERTS):
        gate = x @ p["gate"][e]
        hidden = gate / (1 + np.exp(-gate)) * (x @ p["up"][e])
        out += weights[:, e, None] * (hidden @ p["down"][e])
    return out


def test_capacity_drops_whoever_comes_last():
    """15 tokens with 2 choices of 6 experts: 5 places are even, 4 is 0.8 of them."""
    layer, variables, x = built(capacity_factor=0.75)

    def choose(scores):
        weights, taken = np.zeros_like(scores), np.zeros(EXPERTS, int)
        order = np.argsort(scores)[:, ::-1]
        for k in range(2):
            for n, s in enumerate(scores):
                e = order[n, k]
                if taken[e] < 4:
                    weights[n, e] = s[e] / s[order[n, :2]].sum()
                    taken[e] += 1
        assert weights.astype(bool).sum() < 28  # some are dropped
        return weights

    expected = by_the_definition(variables, x, choose)
    found = layer.apply(variables, x)
    np.testing.assert_allclose(found.reshape(-1, WIDTH), expected, rtol=1e-4, atol=1e-5)


def test_room_for_all_equals_dropless():
    layer, variables, x = built(capacity_factor=float(EXPERTS))
    dropless = layer.clone(capacity_factor=None).apply(variables, x)
    np.testing.assert_allclose(layer.apply(variables, x), dropless, rtol=1e-4, atol=1e-6)


def test_experts_choose_their_even_share_of_all_tokens():
    layer, variables, x = built(choice="expert", renormalise=False, scale=0.5)

    def choose(scores):
        weights = np.zeros_like(scores)
        for e in range(EXPERTS):
            tokens = np.argsort(scores[:, e])[::-1][:5]
            weights[tokens, e] = 0.5 * scores[tokens, e]
        return weights

    expected = by_the_definition(variables, x, choose)
    found = layer.apply(variables, x)
    np.testing.assert_allclose(found.reshape(-1, WIDTH), expected, rtol=1e-4, atol=1e-5)


def test_initial_experts_are_as_large_as_one_alone():
    """Glorot's variance of one expert's matrix, which no number of experts changes."""
    fields = {"num_experts": 20, "hidden_width": 50, "top_k": 1}
    layer = MixtureOfExperts(**fields)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 1, 30)))["params"]
    for name in ("gate", "up", "down"):
        np.testing.assert_allclose(jnp.var(params[name]), 2 / (30 + 50), rtol=0.05)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_losses_are_sown_where_asked_for_and_not_on_initialising(scores):
    layer, variables, x = built(scores=scores, balance_coefficient=0.25, z_coefficient=0.5)
    assert set(variables) == {"params"}
    _, sown = layer.apply(variables, x, mutable=["losses", "intermediates"])
    logits = x @ variables["params"]["router"]["kernel"]
    probabilities = jax.nn.softmax(logits) if scores == "softmax" else jax.nn.sigmoid(logits)
    _, experts = routing.top_k_routing(probabilities, 2)
    if scores == "softmax":
        balance = routing.load_balance_loss(probabilities, experts)
    else:
        balance = routing.sequence_balance_loss(probabilities, experts)
    losses = sown["losses"]
    assert set(losses) == {"balance", "router_z"}
    np.testing.assert_allclose(losses["balance"][0], 0.25 * balance, rtol=1e-5)
    z = 0.5 * routing.router_z_loss(logits)
    np.testing.assert_allclose(losses["router_z"][0], z, rtol=1e-5)
    (load,) = sown["intermediates"]["expert_load"]
    np.testing.assert_array_equal(load, np.bincount(np.ravel(experts), minlength=EXPERTS))
    silent = layer.clone(balance_coefficient=0.0, z_coefficient=0.0)
    assert "losses" not in silent.apply(variables, x, mutable=["losses"])[1]


@pytest.mark.parametrize(
    "options",
    [
        {"balance_coefficient": 0.25, "z_coefficient": 0.5, "capacity_factor": 0.75},
        {"scores": "sigmoid", "balance_coefficient": 0.25, "bias_rate": 0.125},
        {"choice": "expert", "renormalise": False, "z_coefficient": 0.5},
    ],
)
def test_padding_counts_nowhere_and_takes_no_place(options):
    """As many tokens of padding come before the others: half the share leaves as many places."""
    layer, variables, x = built(**options)
    collections = ["losses", "intermediates", "router"]
    expected, alone = layer.apply(variables, x, mutable=collections)
    padding = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), x.dtype)
    counted = jnp.concatenate([jnp.zeros(x.shape[:2], bool), jnp.ones(x.shape[:2], bool)], axis=1)
    if "capacity_factor" in options:
        layer = layer.clone(capacity_factor=options["capacity_factor"] / 2)
    if "choice" in options:
        layer = layer.clone(top_k=1)
    padded = jnp.concatenate([padding, x], axis=1)
    found, beside = layer.apply(variables, padded, counted, mutable=collections)
    np.testing.assert_allclose(found[:, x.shape[1] :], expected, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), beside, alone)


def test_bias_moves_only_where_it_may_and_evens_the_load():
    layer, variables, x = built(scores="sigmoid", bias_rate=0.0625)
    assert not variables["router"]["router"]["bias"].any()
    apply = jax.jit(lambda v: layer.apply(v, x, mutable=["router", "intermediates"])[1])
    first = apply(variables)
    load = first["intermediates"]["expert_load"][0]
    expected = 0.0625 * np.sign(5 - np.asarray(load))
    np.testing.assert_array_equal(first["router"]["router"]["bias"], expected)
    moved = variables
    for _ in range(40):
        moved = {**moved, "router": apply(moved)["router"]}
    evened = apply(moved)["intermediates"]["expert_load"][0]
    assert evened.max() < load.max()
    assert isinstance(layer.apply(variables, x), jax.Array)  # reading it is enough


def test_router_stays_in_float32_and_the_rest_does_not():
    layer, variables, x = built(dtype=jnp.bfloat16)
    out, sown = layer.apply(variables, x, mutable=["intermediates"], capture_intermediates=True)
    assert out.dtype == jnp.bfloat16
    assert sown["intermediates"]["router"]["__call__"][0][0].dtype == jnp.float32
    exact = layer.clone(dtype=jnp.float32).apply(variables, x)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_experts_split_over_devices(capacity_factor):
    """Each of two devices holds half of the experts, and the outcome is the same."""
    layer, variables, x = built(capacity_factor=capacity_factor)
    expected = layer.apply(variables, x)
    mesh = training.make_mesh("fsdp=2", devices=jax.devices()[:2])
    rules = [(r"(gate|up|down)$", PartitionSpec("fsdp")), ("router", PartitionSpec())]
    places = training.sharding.tree_shardings(variables, mesh, rules)
    split = jax.device_put(variables, places)
    assert split["params"]["up"].addressable_shards[0].data.shape == (3, WIDTH, HIDDEN)
    np.testing.assert_allclose(jax.jit(layer.apply)(split, x), expected, rtol=1e-5, atol=1e-6)


def test_bad_input():
    cases = [
        ({"scores": "tanh"}, r"MixtureOfExperts: scores='tanh' is neither"),
        ({"choice": "both"}, r"choice='both' is neither"),
        ({"capacity_factor": 0.0}, r"capacity_factor=0.0 must be positive; None drops nothing"),
        ({"groups": 4}, r"MixtureOfExperts: 6 experts do not divide into groups=4"),
        ({"top_k": 7}, r"top_k=7 must lie in 1 to 6"),
        (
            {"choice": "expert", "bias_rate": 0.1},
            r'choice="expert" contradicts .*renormalise.*bias_rate.*use .*False.*None',
        ),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            built(**fields)
