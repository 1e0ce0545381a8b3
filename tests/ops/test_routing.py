"""Routing against loops in NumPy, torch, and the published code of Mixtral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxmodels.ops import routing


def scores_of(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 1, size=shape).astype(np.float32)


def chosen_by_loop(scores, top_k, bias, groups, top_groups, renormalise, scale):
    """Token by token, by the definition."""
    weights, experts = [], []
    for s in scores.astype(np.float64):
        preferred = s + bias
        parts = np.split(np.arange(len(s)), groups)
        quality = [np.sort(preferred[part])[-2:].sum() for part in parts]
        best = np.argsort(quality)[::-1][:top_groups]
        allowed = np.concatenate([parts[g] for g in best])
        e = allowed[np.argsort(preferred[allowed])[::-1][:top_k]]
        experts.append(e)
        weights.append(scale * s[e] / (s[e].sum() if renormalise else 1))
    return np.array(weights), np.array(experts)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1, "renormalise": False},
        {"top_k": 3, "scale": 2.5},
        {"top_k": 3, "bias": True, "renormalise": False, "scale": 0.5},
        {"top_k": 5, "bias": True, "groups": 5, "top_groups": 2},
        {"top_k": 4, "groups": 3, "top_groups": 2},
        {"top_k": 2, "groups": 3, "top_groups": 3},
    ],
)
def test_tokens_choose_as_by_the_definition(options):
    scores = scores_of(31, 15)
    bias = np.random.default_rng(1).normal(size=15).astype(np.float32) * bool(options.get("bias"))
    defaults = {"groups": 1, "top_groups": 1, "renormalise": True, "scale": 1.0}
    expected = chosen_by_loop(scores, **{**defaults, **options, "bias": bias})
    given = {**options, "bias": jnp.asarray(bias) if options.get("bias") else None}
    found = jax.jit(lambda s: routing.top_k_routing(s, **given))(scores)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)


def test_weights_alone_carry_the_gradient_and_zero_scores_are_finite():
    scores, target = scores_of(7, 5), scores_of(7, 3, seed=1)
    theirs = torch.tensor(scores, requires_grad=True)
    top = theirs.topk(3).values
    (top / top.sum(-1, keepdim=True) * torch.tensor(target)).sum().backward()
    bias = jnp.zeros(5)

    def loss(scores, bias):
        return jnp.sum(routing.top_k_routing(scores, 3, bias=bias)[0] * target)

    of_scores, of_bias = jax.grad(loss, (0, 1))(jnp.asarray(scores), bias)
    np.testing.assert_allclose(of_scores, theirs.grad, rtol=1e-4, atol=1e-6)
    assert not of_bias.any()
    weights, _ = routing.top_k_routing(jnp.zeros((2, 5)), 3)
    assert not weights.any()


def test_leading_axes_and_vmap():
    scores = jnp.asarray(scores_of(2, 3, 7))
    together = routing.top_k_routing(scores, 2)
    apart = jax.vmap(jax.vmap(lambda s: routing.top_k_routing(s, 2)))(scores)
    jax.tree.map(np.testing.assert_array_equal, together, apart)


def test_experts_choose_as_by_the_definition():
    scores = scores_of(13, 5)
    weights, tokens = jax.jit(lambda s: routing.expert_choice(s, 3))(scores)
    for e in range(5):
        expected = np.argsort(scores[:, e])[::-1][:3]
        np.testing.assert_array_equal(tokens[e], expected)
        np.testing.assert_array_equal(weights[e], scores[expected, e])


@pytest.mark.parametrize("capacity", [1, 3, 31])
def test_places_are_given_to_first_choices_first(capacity):
    """With more places than choices some stay empty; the last expert is chosen by nobody."""
    rng = np.random.default_rng(2)
    experts = np.array([rng.permutation(5)[:2] for _ in range(17)])
    weights = scores_of(17, 2)
    expected = [[] for _ in range(6)]
    for k in range(2):
        for n in range(17):
            if len(expected[experts[n, k]]) < capacity:
                expected[experts[n, k]].append((n, weights[n, k]))
    found = jax.jit(lambda w, e: routing.capacity_slots(w, e, 6, capacity))(weights, experts)
    assert found[0].shape == found[1].shape == (6, capacity)
    for e, places in enumerate(expected):
        padded = places + [(0, 0.0)] * (capacity - len(places))
        np.testing.assert_array_equal(found[1][e], [n for n, _ in padded])
        np.testing.assert_array_equal(found[0][e], np.array([w for _, w in padded], np.float32))


def test_load_counts_choices():
    experts = np.random.default_rng(3).integers(0, 5, size=(7, 11, 2))
    load = routing.expert_load(jnp.asarray(experts), 6)
    assert load.dtype == jnp.int32
    np.testing.assert_array_equal(load, np.bincount(experts.ravel(), minlength=6))


def test_balance_loss_equals_that_of_mixtral_in_value_and_gradient():
    logits = np.random.default_rng(4).normal(size=(3, 11, 7)).astype(np.float32)
    theirs = torch.tensor(logits.reshape(33, 7), requires_grad=True)
    expected = load_balancing_loss_func((theirs,), num_experts=7, top_k=2)
    expected.backward()

    def loss(logits):
        probabilities = jax.nn.softmax(logits)
        return routing.load_balance_loss(probabilities, routing.top_k_routing(probabilities, 2)[1])

    found, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(gradient.reshape(33, 7), theirs.grad, rtol=1e-4, atol=1e-7)


def test_balance_loss_leaves_out_what_mixtral_masks():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 11, 7)).astype(np.float32)
    counted = rng.random((3, 11)) < 0.6
    theirs = torch.tensor(logits.reshape(33, 7), requires_grad=True)
    expected = load_balancing_loss_func((theirs,), 7, 2, torch.tensor(counted, dtype=torch.int64))
    expected.backward()

    def loss(logits):
        probabilities = jax.nn.softmax(logits)
        experts = routing.top_k_routing(probabilities, 2)[1]
        choices = routing.counted_choices(experts, jnp.asarray(counted), 7)
        return routing.load_balance_loss(probabilities, choices)

    found, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(gradient.reshape(33, 7), theirs.grad, rtol=1e-4, atol=1e-7)


def test_balance_losses_where_all_is_even_and_where_nothing_is():
    even = jnp.full((2, 6, 3), 1 / 3)
    turns = jnp.stack([jnp.arange(6) % 3, (jnp.arange(6) + 1) % 3], axis=-1)
    turns = jnp.stack([turns, turns])
    np.testing.assert_allclose(routing.load_balance_loss(even, turns), 2, rtol=1e-6)
    np.testing.assert_allclose(routing.sequence_balance_loss(even, turns), 1, rtol=1e-6)
    certain = jnp.zeros((2, 6, 3)).at[..., 1].set(1)
    same = jnp.ones((2, 6, 1), int)
    np.testing.assert_allclose(routing.load_balance_loss(certain, same), 3, rtol=1e-6)


def test_sequence_balance_as_by_the_definition():
    """Sequences that are uneven in opposite ways are not even together."""
    rng = np.random.default_rng(5)
    scores = rng.uniform(size=(3, 11, 7)).astype(np.float32)
    experts = np.array([[rng.permutation(7)[:2] for _ in range(11)] for _ in range(3)])
    total = 0.0
    for s, chosen in zip(scores.astype(np.float64), experts, strict=True):
        f = 7 / (2 * 11) * np.bincount(chosen.ravel(), minlength=7)
        total += np.sum(f * np.mean(s / s.sum(-1, keepdims=True), axis=0)) / 3
    experts = jnp.asarray(experts)
    found = routing.sequence_balance_loss(jnp.asarray(scores), experts)
    np.testing.assert_allclose(found, total, rtol=1e-6)
    assert jnp.isfinite(routing.sequence_balance_loss(jnp.zeros((1, 2, 7)), experts[:1, :2]))


def test_z_loss_equals_torch():
    logits = np.random.default_rng(6).normal(0, 3, size=(5, 3, 7)).astype(np.float32)
    expected = torch.logsumexp(torch.tensor(logits), -1).square().mean()
    np.testing.assert_allclose(routing.router_z_loss(jnp.asarray(logits)), expected, rtol=1e-6)


def test_what_is_not_counted_is_as_if_it_were_not_there():
    """In the losses of sequences and of logits; a sequence of padding alone is none."""
    rng = np.random.default_rng(7)
    logits = jnp.asarray(rng.normal(size=(3, 11, 7)), jnp.float32)
    counted = jnp.zeros((3, 11), bool).at[0, 2:9].set(True).at[2, 2:9].set(True)
    z = routing.router_z_loss(logits, counted)
    np.testing.assert_allclose(z, routing.router_z_loss(logits[::2, 2:9]), rtol=1e-6)
    scores = jax.nn.sigmoid(logits)
    experts = routing.top_k_routing(scores, 2)[1]
    choices = routing.counted_choices(experts, counted, 7)
    alone = routing.sequence_balance_loss(scores[::2, 2:9], experts[::2, 2:9])
    np.testing.assert_allclose(routing.sequence_balance_loss(scores, choices), alone, rtol=1e-6)
    nothing = jnp.full_like(experts, 7)
    assert routing.sequence_balance_loss(scores, nothing) == 0
    assert routing.load_balance_loss(scores, nothing) == 0
    assert routing.router_z_loss(logits, counted & False) == 0


def test_bias_moves_against_the_load():
    load = jnp.array([4, 1, 3, 4, 3])
    moved = routing.updated_bias(jnp.full(5, 0.5), load, 0.25)
    np.testing.assert_array_equal(moved, [0.25, 0.75, 0.5, 0.25, 0.5])


def test_bad_input():
    # Without the suite's own check of shapes.
    top_k_routing, updated_bias = (
        f.__wrapped__ for f in (routing.top_k_routing, routing.updated_bias)
    )
    scores = jnp.ones((7, 12))
    cases = [
        ({"top_k": 13}, r"top_k_routing: top_k=13 must lie in 1 to 12"),
        ({"top_k": 0}, r"top_k=0 must lie in 1 to 12"),
        ({"top_k": 2, "groups": 5}, r"12 experts do not divide into groups=5; choose a divisor"),
        ({"top_k": 2, "groups": 0}, r"do not divide into groups=0"),
        ({"top_k": 2, "groups": 3, "top_groups": 4}, r"top_groups=4 must lie in 1 to groups=3"),
        ({"top_k": 5, "groups": 3, "top_groups": 1}, r"1 to 4, .*\(1 of 3 groups of 4\)"),
        ({"top_k": 2, "groups": 12, "top_groups": 3}, r"groups=12 of one expert each"),
        ({"top_k": 2, "bias": jnp.ones(5)}, r"bias \(5,\) must be \(E,\) = \(12,\)"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            top_k_routing(scores, **options)
    for capacity in (0, 8):
        with pytest.raises(ValueError, match=rf"capacity={capacity} must lie in 1 to the 7 tok"):
            routing.expert_choice(scores, capacity)
    with pytest.raises(ValueError, match=r"capacity_slots: capacity=0 must be at least 1"):
        routing.capacity_slots(jnp.ones((7, 2)), jnp.ones((7, 2), int), 5, 0)
    with pytest.raises(ValueError, match=r"updated_bias: load \(2,\) must be bias's shape = \(3,"):
        updated_bias(jnp.ones(3), jnp.ones(2, int), 0.1)
