"""Mixed chunk attention against its sums in torch, float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.mixed_chunk_attention import empty_mixed_chunk_state, mixed_chunk_attention

LENGTHS = [4, 13, 1, 11]
TOTAL = sum(LENGTHS)
SIZE = 5
WIDTHS = (5, 3, 7)
# Without the suite's shape checks, which would be first to refuse.
as_users_run_it = inspect.unwrap(mixed_chunk_attention)


def arrays(length=TOTAL):
    rng = np.random.default_rng(0)
    widths = (WIDTHS[0], WIDTHS[0], WIDTHS[1], WIDTHS[1], WIDTHS[2])
    return [rng.normal(size=(2, length, width)) for width in widths]


def definition(quad_q, quad_k, lin_q, lin_k, v, kernel, causal):
    """One document: the sums of equations 7 and 8, one query after the other."""
    outs = []
    length = v.shape[1]
    for t in range(length):
        chunk = t // SIZE * SIZE
        near = slice(chunk, t + 1 if causal else min(chunk + SIZE, length))
        logits = (quad_k[:, near] * quad_q[:, t, None]).sum(-1)
        weights = logits.clamp(min=0) ** 2 if kernel == "relu2" else logits.softmax(-1)
        out = (weights[..., None] * v[:, near]).sum(1)
        far = chunk if causal else length
        if far:
            products = (lin_k[:, :far] * lin_q[:, t, None]).sum(-1)
            out = out + (products[..., None] * v[:, :far]).mean(1)
        outs.append(out)
    return torch.stack(outs, 1)


def assert_matches(lengths, kernel, causal, form, packed):
    inputs = arrays(sum(lengths))
    weight = np.random.default_rng(1).normal(size=inputs[-1].shape)
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    documents = zip(*(x.split(lengths, 1) for x in leaves), strict=True)
    out = torch.cat([definition(*each, kernel, causal) for each in documents], 1)
    (out * torch.from_numpy(weight)).sum().backward()

    ids = jnp.asarray(np.stack([np.repeat([7, 3, 7, 9][: len(lengths)], lengths)] * 2))

    def loss(*inputs):
        out, _ = mixed_chunk_attention(
            *inputs,
            kernel=kernel,
            causal=causal,
            chunk_size=SIZE,
            segment_ids=ids if packed else None,
            form=form,
        )
        return jnp.sum(out * weight), out

    grads, found = jax.jit(jax.grad(loss, range(5), has_aux=True))(
        *(jnp.asarray(x, jnp.float32) for x in inputs)
    )
    # Nothing is linear in the first chunk, and torch has no gradient there.
    zeros = [torch.zeros_like(x) for x in leaves]
    grads_wanted = [z if x.grad is None else x.grad for x, z in zip(leaves, zeros, strict=True)]
    wanted = (out.detach(), *grads_wanted)
    for ours, theirs in zip((found, *grads), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kernel", ["relu2", "softmax"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "form", "packed"),
    [
        ([TOTAL], "chunked", False),
        (LENGTHS, "chunked", True),
        (LENGTHS, "parallel", True),
    ],
)
def test_values_and_gradients_are_those_of_the_sums(lengths, form, packed, kernel, causal):
    assert_matches(lengths, kernel, causal, form, packed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[1], [1, 2]])
def test_less_than_a_chunk(lengths, causal):
    assert_matches(lengths, "relu2", causal, "chunked", packed=len(lengths) > 1)


@jax.jit
def stream(inputs, state, segment_ids=None):
    return mixed_chunk_attention(
        *inputs, causal=True, chunk_size=SIZE, segment_ids=segment_ids, initial_state=state
    )


def floats(inputs):
    return [jnp.asarray(x, jnp.float32) for x in inputs]


def test_calls_in_succession_are_one_call():
    """Pieces shorter than a chunk, longer than two, and ending on a border of chunks."""
    inputs = floats(arrays())
    whole, last = mixed_chunk_attention(*inputs, causal=True, chunk_size=SIZE)
    state = empty_mixed_chunk_state(2, SIZE, WIDTHS, jnp.float32)
    outs, start = [], 0
    for length in (1, 1, 3, 12, 12):
        piece = [x[:, start : start + length] for x in inputs]
        out, state = stream(piece, state)
        outs.append(out)
        start += length
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=2e-5)
    np.testing.assert_allclose(state.memory, last.memory, atol=2e-5)
    np.testing.assert_array_equal(state.length, [TOTAL, TOTAL])


@pytest.mark.parametrize("cut", [10, 15])
def test_a_state_goes_on_with_its_document_alone(cut):
    """Cut inside the second document, whose chunks begin where those of a call do not."""
    inputs = floats(arrays())
    ids = jnp.asarray(np.stack([np.repeat(range(4), LENGTHS)] * 2))
    whole, last = mixed_chunk_attention(*inputs, causal=True, chunk_size=SIZE, segment_ids=ids)
    state = empty_mixed_chunk_state(2, SIZE, WIDTHS, jnp.float32)
    first, state = stream([x[:, :cut] for x in inputs], state, ids[:, :cut])
    second, state = stream([x[:, cut:] for x in inputs], state, ids[:, cut:])
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=2e-5)
    np.testing.assert_allclose(state.memory, last.memory, atol=2e-5)
    np.testing.assert_array_equal(state.length, [11, 11])


def test_time_grows_as_the_length():
    def flops(length):
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        call = jax.jit(lambda *x: mixed_chunk_attention(*x, causal=True, chunk_size=64)[0])
        return call.lower(*[x] * 5).compile().cost_analysis()["flops"]

    assert flops(8192) < 4.2 * flops(2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"kernel": "exp"}, "kernel='exp'"),
        ({"form": "recurrent"}, "form='recurrent'"),
        ({"initial_state": "x"}, "initial_state is for causal=True"),
        ({"segment_ids": jnp.zeros((2, 4), jnp.int32)}, r"segment_ids \(2, 4\) must be \(B, T\)"),
    ],
)
def test_bad_options_are_refused(options, message):
    x = jnp.zeros((2, 5, 3))
    with pytest.raises(ValueError, match=message):
        as_users_run_it(x, x, x, x, x, **options)


def test_bad_shapes_are_refused():
    x = jnp.zeros((2, 5, 3))
    with pytest.raises(ValueError, match="agree in width"):
        as_users_run_it(x, x[..., :2], x, x, x)
    with pytest.raises(ValueError, match="of the same B and T"):
        as_users_run_it(x, x, x, x[:, :4], x)
