"""The delta rules, token by token in float64 and as transformers has them: all forms and gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from jaxmodels.ops.delta_rule import delta_rule, gated_delta_rule
from jaxmodels.ops.kimi_delta import kimi_delta_rule

RULES = {"delta": delta_rule, "gated": gated_delta_rule, "kimi": kimi_delta_rule}
BATCH, LENGTH, HEADS, WIDTH, VALUE = 2, 19, 3, 5, 7
# Borders on the edge of a chunk of 4, inside one, and two in one; an id that comes back.
SEGMENTS = np.repeat([[3, 1, 3, 2, 5], [4, 7, 4, 1, 2]], [4, 5, 1, 8, 1], axis=1)
SEGMENTS[1] = np.roll(SEGMENTS[1], 2)


def draw(rule, *, batch=BATCH, length=LENGTH, heads=HEADS, width=WIDTH, value=VALUE, seed=0):
    """Inputs by name, with keys of length 1 and all gates in use."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads)
    q, k = (rng.normal(size=(*shape, width)) for _ in range(2))
    inputs = {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    inputs["v"] = rng.normal(size=(*shape, value))
    if rule != "delta":
        gates = (*shape, width) if rule == "kimi" else shape
        inputs["log_decay"] = -np.exp(rng.normal(-1, 2, size=gates))
    inputs["beta"] = rng.uniform(0, 1, size=shape)
    inputs["initial_state"] = rng.normal(size=(batch, heads, width, value))
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}


def definition(q, k, v, beta, initial_state, log_decay=None, segment_ids=None):
    """One token after the other, one memory a head; torch for its derivatives."""
    outs, states = [], []
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        state = initial_state[b, h]
        for t in range(q.shape[1]):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                state = torch.zeros_like(state)
            if log_decay is not None:
                state = torch.exp(log_decay[b, t, h]).reshape(-1, 1) * state
            error = v[b, t, h] - state.T @ k[b, t, h]
            state = state + beta[b, t, h] * torch.outer(k[b, t, h], error)
            outs.append(state.T @ q[b, t, h])
        states.append(state)
    out = torch.stack(outs).reshape(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    return out, torch.stack(states).reshape(initial_state.shape)


def theirs(run, inputs, weights):
    """Output, final state and the gradients of their weighted sum, in torch."""
    leaves = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in inputs.items()}
    results = run(**leaves)
    loss = sum((x * torch.from_numpy(w)).sum() for x, w in zip(results, weights, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = dict(zip(leaves, grads, strict=True))
    return {"out": results[0].detach(), "state": results[1].detach(), **found}


@functools.cache
def compiled(rule, **options):
    def run(inputs, segment_ids, weights):
        def loss(inputs):
            results = RULES[rule](**inputs, segment_ids=segment_ids, **options)
            return sum(jnp.vdot(x, w) for x, w in zip(results, weights, strict=True)), results

        gradients, (out, state) = jax.grad(loss, has_aux=True)(inputs)
        return {"out": out, "state": state, **gradients}

    return jax.jit(run)


def ours(rule, inputs, weights, segment_ids=None, **options):
    return compiled(rule, **options)(inputs, segment_ids, weights)


def weights_for(inputs):
    rng = np.random.default_rng(1)
    shapes = inputs["v"].shape, inputs["initial_state"].shape
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_close(actual, expected, tolerance=2e-5):
    assert set(actual) == set(expected)
    for name, x in expected.items():
        bound = tolerance * max(1.0, float(abs(x).max()))
        np.testing.assert_allclose(actual[name], x, rtol=0, atol=bound, err_msg=name)


@functools.cache
def expected_by_definition(rule, segmented):
    inputs = draw(rule)
    wide = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
    weights = [w.astype(np.float64) for w in weights_for(inputs)]
    run = functools.partial(definition, segment_ids=SEGMENTS if segmented else None)
    return theirs(run, wide, weights)


@pytest.mark.parametrize(
    "form, segmented",
    [("chunked", False), ("chunked", True), ("parallel", True), ("recurrent", True)],
)
@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients_follow_the_definition(rule, form, segmented):
    inputs = draw(rule)
    ids = jnp.asarray(SEGMENTS) if segmented else None
    found = ours(rule, inputs, weights_for(inputs), ids, form=form, chunk_size=4)
    assert_close(found, expected_by_definition(rule, segmented))


def unscaled(run):
    """The peer scales queries, which we leave to the caller."""

    def call(q, k, v, beta, initial_state, log_decay):
        return run(
            q * q.shape[-1] ** 0.5,
            k,
            v,
            log_decay,
            beta,
            initial_state=initial_state,
            output_final_state=True,
        )

    return call


@pytest.mark.parametrize(
    "rule, peer",
    [("gated", torch_chunk_gated_delta_rule), ("kimi", chunk_kimi_delta_attention)],
)
def test_full_chunks_match_transformers(rule, peer):
    inputs = draw(rule, batch=1, length=131, heads=2)
    weights = weights_for(inputs)
    expected = theirs(unscaled(peer), inputs, weights)
    assert_close(ours(rule, inputs, weights), expected, 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_a_full_write_replaces_what_was_stored(rule):
    """With keys of length 1. The same key again and again is the hardest case.

    Its system is all ones: the powers of it reach 1e18, its inverse only 1.
    """
    inputs = draw(rule, batch=2, length=64, heads=1)
    k = inputs["k"].at[1].set(inputs["k"][1, :1])
    inputs.update(q=k, k=k, beta=jnp.ones_like(inputs["beta"]))
    if rule != "delta":
        inputs["log_decay"] = inputs["log_decay"].at[1].set(0.0)
    out, _ = jax.jit(RULES[rule])(**inputs)
    np.testing.assert_allclose(out, inputs["v"], atol=1e-5)


def test_a_write_of_strength_zero_changes_nothing():
    inputs = draw("delta", batch=1, heads=1)
    inputs["beta"] = jnp.zeros_like(inputs["beta"])
    out, state = jax.jit(delta_rule)(**inputs)
    np.testing.assert_array_equal(state, inputs["initial_state"])
    expected = inputs["q"][:, :, 0] @ inputs["initial_state"][0, 0]
    np.testing.assert_allclose(out[:, :, 0], expected, atol=1e-5)


@functools.cache
def long(rule):
    return draw(rule, batch=1, length=4096, heads=1, width=3, value=2)


@pytest.mark.parametrize("gates", [-np.inf, -1e4, -1e-8, 0.0, "mixed"])
@pytest.mark.parametrize("rule", ["gated", "kimi"])
def test_extreme_gates_stay_finite_and_right(rule, gates):
    inputs = dict(long(rule))
    shape = inputs["log_decay"].shape
    if gates == "mixed":
        some = np.random.default_rng(2).choice([-np.inf, -1e4, -3.0, -0.01, 0.0], size=shape)
        inputs["log_decay"] = jnp.asarray(some, jnp.float32)
    else:
        inputs["log_decay"] = jnp.full(shape, gates, np.float32)
    found = ours(rule, inputs, weights_for(inputs))
    assert all(jnp.isfinite(x).all() for x in found.values())
    start = {name: x if name == "initial_state" else x[:, :300] for name, x in inputs.items()}
    start = {name: torch.tensor(np.asarray(x, np.float64)) for name, x in start.items()}
    expected, _ = definition(**start)
    np.testing.assert_allclose(found["out"][:, :300], expected, atol=1e-3)


def test_leading_axes_and_vmap_agree():
    inputs = draw("kimi", batch=6)
    grid = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), inputs)
    run = functools.partial(kimi_delta_rule, chunk_size=4)
    by_axes = jax.jit(lambda x: run(**x))(grid)
    by_vmap = jax.jit(jax.vmap(jax.vmap(lambda x: run(**x))))(grid)
    in_batch = ours("kimi", inputs, weights_for(inputs), form="recurrent", chunk_size=4)
    batched = in_batch["out"], in_batch["state"]
    for axes, mapped, flat in zip(by_axes, by_vmap, batched, strict=True):
        np.testing.assert_allclose(axes, mapped, atol=1e-5)
        np.testing.assert_allclose(axes, flat.reshape(axes.shape), atol=1e-5)


def test_decoding_a_token_takes_the_recurrent_form():
    inputs = draw("kimi", length=1)
    forms = (functools.partial(kimi_delta_rule, form=form) for form in ("chunked", "recurrent"))
    chunked, recurrent = (str(jax.make_jaxpr(lambda x, f=f: f(**x))(inputs)) for f in forms)
    assert chunked == recurrent


def test_bfloat16_goes_in_and_out_around_a_float32_state():
    inputs = draw("gated")
    state = inputs["initial_state"]
    narrow = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    run = jax.jit(functools.partial(gated_delta_rule, form="recurrent"))
    out, last = run(**narrow | {"initial_state": state})
    widened = {name: x.astype(jnp.float32) for name, x in narrow.items()}
    expected, expected_last = run(**widened | {"initial_state": state})
    assert (out.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(out, expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(last, expected_last)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"form": "fast"}, r"form='fast' is unknown; use one of chunked, parallel, recurrent"),
        ({"chunk_size": 0}, r"chunk_size=0 must be at least 1"),
        ({"k": (2, 19, 3, 4)}, r"q \(2, 19, 3, 5\) and k \(2, 19, 3, 4\) must be \(\*B, T, H, K\)"),
        ({"v": (2, 18, 3, 7)}, r"v \(2, 18, 3, 7\) \(\*B, T, H, V\), with the same"),
        ({"v": (2, 19, 3, 0)}, r"nothing empty"),
        ({"beta": (2, 19, 2)}, r"beta \(2, 19, 2\) must be \(\*B, T, H\) = \(2, 19, 3\)"),
        ({"log_decay": (2, 19)}, r"log_decay \(2, 19\) must be .* = \(2, 19, 3"),
        ({"log_decay": 0.1}, r"log_decay holds 0.1, outside \[-inf, 0\]"),
        ({"initial_state": (2, 3, 7, 5)}, r"initial_state \(2, 3, 7, 5\) .* \(2, 3, 5, 7\)"),
        ({"segment_ids": (2, 18)}, r"segment_ids \(2, 18\) must be \(\*B, T\) = \(2, 19\)"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_bad_input_is_named(rule, changes, message):
    inputs = draw(rule)
    for name, change in changes.items():
        if rule == "delta" and name == "log_decay":
            return  # has no gate
        if isinstance(change, tuple):
            change = jnp.zeros(change, int if name == "segment_ids" else jnp.float32)
        elif isinstance(change, float):
            change = jnp.full_like(inputs[name], change)
        inputs[name] = change
    # Without the run-time checks of annotations, which the test suite adds.
    as_users_run_it = RULES[rule].__wrapped__
    with pytest.raises(ValueError, match=rf"^{RULES[rule].__name__}: .*{message}"):
        as_users_run_it(**inputs)
