"""The short convolution against torch's grouped conv1d in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.short_convolution import short_convolution

WIDTH = 5
# Without the suite's shape checks, which would be first to refuse.
as_users_run_it = inspect.unwrap(short_convolution)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def conv1d(x, kernel, bias, before):
    """(B, T, D) with the W - 1 inputs before it."""
    joined = torch.cat([before, x], 1).mT
    return torch.nn.functional.conv1d(joined, kernel.T[:, None], bias, groups=WIDTH).mT


def matches(lengths, size, with_bias=True, with_state=True, packed=False):
    total = sum(lengths)
    inputs = dict(
        zip("xkbs", arrays((2, total, 5), (size, 5), (5,), (2, size - 1, 5)), strict=True)
    )
    weight, state_weight = arrays((2, total, 5), (2, size - 1, 5))
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in inputs.items()}
    bias = leaves["b"] if with_bias else None
    before = leaves["s"] if with_state else torch.zeros(2, size - 1, 5, dtype=torch.float64)
    outs = []
    for part in leaves["x"].split(lengths, 1):
        outs.append(conv1d(part, leaves["k"], bias, before))
        last = torch.cat([before, part], 1)[:, part.shape[1] :]
        before = torch.zeros_like(before)
    wanted = torch.cat(outs, 1)
    loss = (wanted * torch.from_numpy(weight)).sum() + (last * torch.from_numpy(state_weight)).sum()
    loss.backward()
    ids = jnp.asarray(np.stack([np.repeat([4, 1, 4], lengths)] * 2)) if packed else None

    def ours(arrays):
        out, state = short_convolution(
            arrays["x"],
            arrays["k"],
            arrays["b"] if with_bias else None,
            initial_state=arrays["s"] if with_state else None,
            segment_ids=ids,
        )
        return jnp.sum(out * weight) + jnp.sum(state * state_weight), (out, state)

    inputs = {name: jnp.asarray(value, jnp.float32) for name, value in inputs.items()}
    grads, (out, state) = jax.jit(jax.grad(ours, has_aux=True))(inputs)
    np.testing.assert_allclose(out, wanted.detach(), atol=1e-5)
    np.testing.assert_allclose(state, last.detach(), atol=1e-6)
    for name, leaf in leaves.items():
        grad = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad
        np.testing.assert_allclose(grads[name], grad, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("size", [1, 4])
def test_a_sequence_and_what_came_before(size):
    matches([11], size)


def test_without_bias_and_state():
    matches([11], 4, with_bias=False, with_state=False)


def test_fewer_tokens_than_it_sees():
    matches([2], 4)


@pytest.mark.parametrize("lengths", [[6, 3, 4], [6, 4, 1], [1, 1, 2]])
def test_documents_are_separate_and_the_state_is_of_the_last(lengths):
    """The earlier inputs belong to the first document, also where the last is short."""
    matches(lengths, 4, packed=True)


def test_half_precision_comes_back():
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in arrays((1, 3, 5), (2, 5)))
    out, state = short_convolution(x, kernel.astype(jnp.float32))
    assert out.dtype == state.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("kernel", "state", "ids", "message"),
    [
        ((4, 3), (2, 3, 5), (2, 7), r"kernel \(4, 3\) must be \(W, D\) = \(4, 5\)"),
        ((4, 5), (2, 4, 5), (2, 7), r"initial_state \(2, 4, 5\) must be .* = \(2, 3, 5\)"),
        ((4, 5), (2, 3, 5), (2, 6), r"segment_ids \(2, 6\) must be \(B, T\) = \(2, 7\)"),
    ],
)
def test_bad_shapes_are_refused(kernel, state, ids, message):
    with pytest.raises(ValueError, match=f"short_convolution: {message}"):
        as_users_run_it(
            jnp.zeros((2, 7, 5)),
            jnp.zeros(kernel),
            initial_state=jnp.zeros(state),
            segment_ids=jnp.zeros(ids, jnp.int32),
        )
