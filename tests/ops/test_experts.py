"""Experts against torch, which passes every token through every expert."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops import experts as ops
from jaxmodels.ops.experts import capacity_experts, dropless_experts

EXPERTS, WIDTH, HIDDEN = 5, 7, 11


def matrices(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def tokens_and_choices(num_tokens, probabilities):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(num_tokens, WIDTH)).astype(np.float32)
    weights = rng.uniform(0.1, 1, size=(num_tokens, 2)).astype(np.float32)
    choices = [rng.choice(EXPERTS, 2, replace=False, p=probabilities) for _ in range(num_tokens)]
    return x, weights, jnp.array(choices)


def through_all(x, gate, up, down):
    """(N, E, D): every token through every expert."""
    hidden = torch.nn.functional.silu(torch.einsum("nd,edf->nef", x, gate))
    return torch.einsum("nef,efd->ned", hidden * torch.einsum("nd,edf->nef", x, up), down)


def in_torch(x, weights, choices, mats, cotangent):
    """The output, and the gradients of x, weights and matrices."""
    leaves = [torch.tensor(a, dtype=torch.float64).requires_grad_() for a in (x, weights, *mats)]
    every = through_all(leaves[0], *leaves[2:])
    picked = torch.take_along_dim(
        every, torch.tensor(np.asarray(choices, np.int64))[..., None], dim=1
    )
    out = (leaves[1][..., None] * picked).sum(1)
    out.backward(torch.tensor(cotangent, dtype=torch.float64))
    return out.detach(), [leaf.grad for leaf in leaves]


# The first has an expert without tokens and one that fills whole blocks and a bit.
LOADS = {
    "uneven": (223, (0.1, 0, 0.2, 0.6, 0.1)),
    "one token": (1, (0.2,) * 5),
    "few tokens": (13, (0.6, 0.1, 0.1, 0.1, 0.1)),
}


@pytest.mark.parametrize("implementation", ["ragged", "blocked"])
@pytest.mark.parametrize("load", LOADS)
def test_dropless_equals_torch_in_values_and_gradients(load, implementation):
    x, weights, choices = tokens_and_choices(*LOADS[load])
    mats = matrices()
    cotangent = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    expected, gradients = in_torch(x, weights, choices, mats, cotangent)
    if load == "uneven":
        assert np.bincount(choices.ravel(), minlength=EXPERTS).tolist()[1] == 0
        assert 128 < np.bincount(choices.ravel())[3] < 256

    @jax.jit
    def both(x, weights, mats, cotangent):
        def call(x, weights, *mats):
            return dropless_experts(x, weights, choices, *mats, implementation=implementation)

        out, pull_back = jax.vjp(call, x, weights, *mats)
        return out, pull_back(cotangent)

    out, found = both(x, weights, mats, cotangent)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4)


def test_one_program_serves_every_load():
    x, weights, _ = tokens_and_choices(13, LOADS["uneven"][1])
    x, weights, *mats = map(jnp.asarray, (x, weights, *matrices()))
    call = jax.jit(chex.assert_max_traces(lambda e: dropless_experts(x, weights, e, *mats), n=1))
    for expert in range(EXPERTS):
        choices = jnp.full((13, 2), expert)
        expected, _ = in_torch(x, weights, choices, mats, x)
        np.testing.assert_allclose(call(choices), expected, rtol=1e-4, atol=1e-4)


def test_vmap_and_half_precision():
    x, weights, choices = tokens_and_choices(14, LOADS["uneven"][1])
    mats = [jnp.asarray(m) for m in matrices()]
    split = [jnp.asarray(a).reshape(2, 7, -1) for a in (x, weights, choices)]
    found = jax.vmap(lambda *a: dropless_experts(*a, *mats))(*split).reshape(14, WIDTH)
    expected, _ = in_torch(x, weights, choices, mats, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    half = dropless_experts(
        *(jnp.asarray(a, jnp.bfloat16) for a in (x, weights)),
        jnp.asarray(choices),
        *(jnp.asarray(m, jnp.bfloat16) for m in mats),
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(("device", "ragged"), [("cpu", False), ("gpu", True), ("tpu", True)])
def test_accelerators_take_the_grouped_product(monkeypatch, device, ragged):
    monkeypatch.setattr(ops, "platform", lambda: device)
    x, weights, choices = map(jnp.asarray, tokens_and_choices(3, (0.2,) * 5))
    traced = jax.make_jaxpr(
        lambda x: dropless_experts(x, weights, choices, *map(jnp.asarray, matrices()))
    )(x)
    assert ("ragged_dot" in str(traced)) == ragged


def test_places_equal_torch_in_values_and_gradients():
    """A token may have many places or none, and a place may be empty."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(13, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, 9, size=(EXPERTS, 3))
    weights = rng.uniform(0.1, 1, size=(EXPERTS, 3)).astype(np.float32)
    weights[2, 1:] = 0
    mats = matrices()
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    leaves = [torch.tensor(a, dtype=torch.float64).requires_grad_() for a in (x, weights, *mats)]
    every = through_all(leaves[0], *leaves[2:])
    expected = torch.zeros(13, WIDTH, dtype=torch.float64)
    for e in range(EXPERTS):
        for c, n in enumerate(tokens[e]):
            place = torch.nn.functional.one_hot(torch.tensor(n), 13)[:, None]
            expected = expected + place * leaves[1][e, c] * every[n, e]
    expected.backward(torch.tensor(cotangent, dtype=torch.float64))

    @jax.jit
    def both(x, weights, mats, cotangent):
        def call(x, weights, *mats):
            return capacity_experts(x, weights, jnp.asarray(tokens), *mats)

        out, pull_back = jax.vjp(call, x, weights, *mats)
        return out, pull_back(cotangent)

    out, found = both(x, weights, mats, cotangent)
    assert not out[9:].any()
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, leaves, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-4)


def test_bad_input():
    x, weights, choices = map(jnp.asarray, tokens_and_choices(3, (0.2,) * 5))
    gate, up, down = map(jnp.asarray, matrices())
    # Without the suite's own check of shapes.
    dropless_experts, capacity_experts = (
        ops.dropless_experts.__wrapped__,
        ops.capacity_experts.__wrapped__,
    )
    with pytest.raises(ValueError, match=r"dropless_experts: weights \(2, 2\) and experts \(3, 2"):
        dropless_experts(x, weights[:2], choices, gate, up, down)
    with pytest.raises(ValueError, match=r'implementation=\'fast\' is none of "auto", "ragged"'):
        dropless_experts(x, weights, choices, gate, up, down, implementation="fast")
    with pytest.raises(ValueError, match=r"down \(5, 7, 11\) \(E, F, D\)"):
        dropless_experts(x, weights, choices, gate, up, gate)
    with pytest.raises(ValueError, match=r"up \(4, 7, 11\) must be \(E, D, F\)"):
        dropless_experts(x, weights, choices, gate, up[:4], down)
    with pytest.raises(ValueError, match=r"x \(3, 5\) has width 5, but gate \(5, 7, 11\) takes 7"):
        dropless_experts(x[:, :5], weights, choices, gate, up, down)
    places, tokens = jnp.ones((4, 3)), jnp.ones((4, 3), int)
    with pytest.raises(ValueError, match=r"capacity_experts: weights \(4, 3\) .* E = 5 experts"):
        capacity_experts(x, places, tokens, gate, up, down)
