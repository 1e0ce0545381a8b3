"""Efficient attention against its two softmaxes in torch's float64, values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from jaxmodels.ops.efficient_attention import efficient_attention, empty_efficient_state

BATCH, LENGTH, HEADS, WIDTH, VALUE = 2, 19, 3, 5, 7
SEGMENTS = np.repeat([[3, 1, 3, 2, 5]], [4, 5, 1, 8, 1], axis=1) + np.array([[0], [10]])
CASES = [
    ("chunked", True, True),
    ("chunked", True, False),
    ("chunked", False, True),
    ("chunked", False, False),
    ("parallel", True, True),
    ("parallel", False, True),
    ("recurrent", True, True),
]


def draw(scale=2.0):
    rng = np.random.default_rng(0)
    widths = (WIDTH, WIDTH, VALUE)
    return [scale * rng.normal(size=(BATCH, LENGTH, HEADS, width)) for width in widths]


def as_float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def reference(q, k, v, causal, segmented):
    """A query at a time: softmax over the features, and over the tokens it may see."""
    ends = [0, 4, 9, 10, 18, 19] if segmented else [0, LENGTH]
    out = []
    for start, end in itertools.pairwise(ends):
        for t in range(start, end):
            seen = slice(start, t + 1 if causal else end)
            means = torch.einsum("bshk,bshv->bhkv", k[:, seen].softmax(1), v[:, seen])
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t].softmax(-1), means))
    return torch.stack(out, 1)


@functools.cache
def compiled(form, causal, segmented):
    def loss(inputs, weights):
        out, state = efficient_attention(
            *inputs,
            causal=causal,
            segment_ids=jnp.asarray(SEGMENTS) if segmented else None,
            form=form,
            chunk_size=4,
        )
        return jnp.sum(out * weights), (out, state)

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize(("form", "causal", "segmented"), CASES)
def test_every_form_is_the_definition(form, causal, segmented):
    q, k, v = draw()
    weights = np.random.default_rng(1).normal(size=v.shape)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    expected = reference(*leaves, causal, segmented)
    (expected * torch.tensor(weights)).sum().backward()
    run = compiled(form, causal, segmented)
    gradients, (out, state) = run(as_float32(q, k, v), as_float32(weights)[0])
    np.testing.assert_allclose(out, expected.detach(), rtol=2e-5, atol=5e-5)
    for ours, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-4, atol=5e-5 * abs(leaf.grad).max())
    assert (state is None) == (not causal)


def test_a_state_continues_the_first_document_alone():
    q, k, v = draw()
    expected = reference(*map(torch.tensor, (q, k, v)), True, True)
    run = jax.jit(
        lambda q, k, v, ids, state: efficient_attention(
            q, k, v, initial_state=state, segment_ids=ids, chunk_size=4
        )
    )
    found, state = [], empty_efficient_state(BATCH, HEADS, key_width=WIDTH, width=VALUE)
    for part in (slice(0, 7), slice(7, LENGTH)):
        inputs = as_float32(*(x[:, part] for x in (q, k, v)))
        out, state = run(*inputs, jnp.asarray(SEGMENTS[:, part]), state)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=2e-5, atol=5e-5)
    np.testing.assert_allclose(state.log_sum, k[:, -1], rtol=1e-5)


def test_keys_of_any_size_are_finite_and_right():
    """Keys to +-600 leave a single token in each softmax."""
    q, k, v = draw()
    k *= 100
    expected = reference(*map(torch.tensor, (q, k, v)), True, False)
    run = compiled("chunked", True, False)
    gradients, (out, _) = run(as_float32(q, k, v), jnp.ones(v.shape))
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_a_large_key_changes_nothing_before_it():
    """Bit for bit, which one maximum over all keys would not do."""
    q, k, v = as_float32(*draw())
    run = compiled("chunked", True, False)
    before, after = (
        run([q, keys, v], jnp.ones_like(v))[1][0] for keys in (k, k.at[:, 14].add(500.0))
    )
    np.testing.assert_array_equal(before[:, :14], after[:, :14])
    assert jnp.any(before[:, 14:] != after[:, 14:])


STATE = empty_efficient_state(BATCH, HEADS, key_width=WIDTH, width=VALUE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "fast"}, "form='fast' is unknown"),
        ({"k": jnp.zeros((2, 19, 3, 4))}, r"q \(2, 19, 3, 5\) and k \(2, 19, 3, 4\) must both"),
        ({"causal": False, "initial_state": STATE}, "initial_state contradicts causal=False"),
        (
            {"initial_state": STATE._replace(log_sum=STATE.log_sum[:1])},
            r"initial_state.log_sum \(1, 3, 5\) must be \(\*B, H, K\) = \(2, 3, 5\)",
        ),
        ({"initial_state": STATE._replace(means=STATE.means[:1])}, r"\(1, 3, 5, 7\) must be"),
    ],
)
def test_bad_input_says_what_to_do(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arguments = dict(zip("qkv", as_float32(*draw()), strict=True)) | changes
    inputs = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=message):
        efficient_attention(*inputs, **arguments)
