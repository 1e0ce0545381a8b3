"""Both gates, in all forms, against the recurrence of the papers in torch float64."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from jaxmodels.ops.gated_linear_attention import (
    gated_linear_attention,
    scalar_gated_linear_attention,
)

GATES = {"scalar": scalar_gated_linear_attention, "vector": gated_linear_attention}
NAMES = ("q", "k", "v", "log_decay", "initial_state")
BATCH, LENGTH, HEADS, WIDTH, VALUE_WIDTH = 2, 29, 3, 5, 7
# The third document begins where a chunk of 8 does, the last has one token.
SEGMENTS = np.repeat([4, 1, 4, 4, 9, 2], [3, 13, 8, 3, 1, 1])


def inputs(gate, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    tokens = (BATCH, length, HEADS)
    arrays = [rng.normal(size=(*tokens, width)) for width in (WIDTH, WIDTH, VALUE_WIDTH)]
    arrays.append(-rng.exponential(size=(*tokens, WIDTH) if gate == "vector" else tokens))
    arrays.append(rng.normal(size=(BATCH, HEADS, WIDTH, VALUE_WIDTH)))
    return {name: jnp.asarray(x, jnp.float32) for name, x in zip(NAMES, arrays, strict=True)}


def by_definition(q, k, v, log_decay, initial_state, segment_ids=None):
    """S_t = decay_t S_(t-1) + k_t v_t^T and out_t = S_t^T q_t, token by token."""
    decay = log_decay.exp() if log_decay.ndim == 4 else log_decay.exp()[..., None]
    state, out = initial_state, []
    for t in range(q.shape[1]):
        if segment_ids is not None and t > 0 and segment_ids[t] != segment_ids[t - 1]:
            state = torch.zeros_like(state)
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, dim=1), state


def wanted_results(arrays):
    with torch.no_grad():
        return by_definition(
            **{name: torch.tensor(np.asarray(x, np.float64)) for name, x in arrays.items()}
        )


def weights(length=LENGTH):
    rng = np.random.default_rng(1)
    shapes = (BATCH, length, HEADS, VALUE_WIDTH), (BATCH, HEADS, WIDTH, VALUE_WIDTH)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def theirs(arrays, segment_ids=None):
    leaves = {
        name: torch.tensor(np.asarray(x, np.float64), requires_grad=True)
        for name, x in arrays.items()
    }
    results = by_definition(**leaves, segment_ids=segment_ids)
    mixed = zip(results, weights(results[0].shape[1]), strict=True)
    sum((x * torch.from_numpy(w)).sum() for x, w in mixed).backward()
    return [x.detach().numpy() for x in (*results, *(leaf.grad for leaf in leaves.values()))]


def ours(gate, arrays, segment_ids=None, **options):
    ids = None if segment_ids is None else jnp.tile(jnp.asarray(segment_ids), (BATCH, 1))

    def loss(arrays):
        results = GATES[gate](**arrays, segment_ids=ids, **options)
        mixed = zip(results, weights(results[0].shape[1]), strict=True)
        return sum(jnp.sum(x * w) for x, w in mixed), results

    gradients, results = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return [*results, *(gradients[name] for name in NAMES)]


def assert_close(found, wanted, tolerance=1e-5):
    for name, mine, other in zip(("out", "state", *NAMES), found, wanted, strict=True):
        atol = tolerance * max(1.0, np.abs(other).max())
        np.testing.assert_allclose(mine, other, rtol=tolerance, atol=atol, err_msg=name)


@pytest.mark.parametrize("gate", GATES)
def test_values_and_gradients_are_those_of_the_recurrence(gate):
    arrays = inputs(gate)
    assert_close(ours(gate, arrays, chunk_size=8), theirs(arrays))


@pytest.mark.parametrize("form", ["chunked", "parallel", "recurrent"])
@pytest.mark.parametrize("gate", GATES)
def test_documents_begin_with_an_empty_memory(gate, form):
    arrays = inputs(gate)
    found = ours(gate, arrays, SEGMENTS, form=form, chunk_size=8)
    assert_close(found, theirs(arrays, SEGMENTS))


@pytest.mark.parametrize("length, chunk_size", [(1, 64), (5, 1), (11, 3), (7, 100)])
@pytest.mark.parametrize("gate", GATES)
def test_any_length_and_chunk_size(gate, length, chunk_size):
    arrays = inputs(gate, length)
    out, state = GATES[gate](**arrays, chunk_size=chunk_size)
    wanted = wanted_results(arrays)
    np.testing.assert_allclose(out, wanted[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_extreme_gates_over_thousands_of_steps(gate):
    """Nothing forgotten, all forgotten, and both at once, still agree with float64."""
    arrays = inputs(gate, 4096, seed=2)
    gates = arrays["log_decay"]
    chosen = np.random.default_rng(3).integers(0, 4, size=gates.shape)
    chosen[:, :1024] = 0
    chosen[:, 1024:2048] = 1
    arrays["log_decay"] = jnp.choose(chosen, [0 * gates, gates - 1e4, gates, gates - jnp.inf])
    out, state, *gradients = ours(gate, arrays)
    assert all(np.isfinite(x).all() for x in gradients)
    for found, wanted in zip((out, state), wanted_results(arrays), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("gate", GATES)
def test_leading_axes_and_vmap_are_batches(gate):
    """Axes in front of time, mapped or not, are the one batch axis reshaped."""
    arrays = inputs(gate)
    call = functools.partial(GATES[gate], chunk_size=8)
    out, state = jax.jit(call)(**arrays)
    stacked = {name: x[None, :, None] for name, x in arrays.items()}
    for folded, unfolded in zip(jax.jit(call)(**stacked), (out, state), strict=True):
        np.testing.assert_allclose(folded[0, :, 0], unfolded, rtol=1e-6, atol=1e-6)
    twice = jax.vmap(jax.vmap(lambda arrays: call(**arrays)))
    for mapped, unfolded in zip(jax.jit(twice)(stacked), (out, state), strict=True):
        np.testing.assert_allclose(mapped[0, :, 0], unfolded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_half_precision_accumulates_in_float32(gate):
    """4,099 equal writes: a sum in bfloat16 would stop growing at 256."""
    ones = jnp.ones((1, 4099, 1, 2), jnp.bfloat16)
    gates = jnp.zeros_like(ones if gate == "vector" else ones[..., 0])
    out, state = jax.jit(GATES[gate])(ones / 2, ones, ones, gates)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_array_equal(state, 4099)
    np.testing.assert_allclose(out[0, :, 0, 0].astype(jnp.float32), np.arange(1, 4100), rtol=4e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"log_decay": "positive"}, r"log_decay holds 0.5, outside \[-inf, 0\]"),
        ({"log_decay": jnp.zeros((BATCH, LENGTH))}, r"log_decay \(2, 29\) must be \(\*B, T, H"),
        ({"v": jnp.zeros((BATCH, LENGTH + 1, HEADS, 7))}, r"v \(2, 30, 3, 7\)"),
        ({"k": jnp.zeros((BATCH, LENGTH, HEADS, 6))}, r"k \(2, 29, 3, 6\) must be"),
        ({"initial_state": jnp.zeros((1, 3, 5, 7))}, r"initial_state \(1, 3, 5, 7\) .*\(2, 3, 5"),
        ({"segment_ids": jnp.zeros((LENGTH,), int)}, r"segment_ids \(29,\) must be .*\(2, 29\)"),
        ({"form": "chunky"}, r"form='chunky' is unknown; use one of chunked, parallel, recurrent"),
        ({"chunk_size": 0}, r"chunk_size=0 must be at least 1"),
    ],
)
@pytest.mark.parametrize("gate", GATES)
def test_bad_input_is_named(gate, change, message, monkeypatch):
    arrays = inputs(gate)
    if change.get("log_decay") == "positive":
        change = {"log_decay": 0.5 - 0 * arrays["log_decay"]}
    function = GATES[gate]
    # The suite's checks of annotations would speak first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rf"^{function.__name__}: .*{message}"):
        function(**{**arrays, **change})
