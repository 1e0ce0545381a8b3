"""Linear attention against its defining sums in float64: every form, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.feature_maps import taylor_features
from jaxmodels.ops.linear_attention import linear_attention

BATCH, LENGTH, HEADS, WIDTH, VALUE = 2, 19, 3, 5, 7
FORMS = [
    ("chunked", True),
    ("parallel", True),
    ("recurrent", True),
    ("chunked", False),
    ("parallel", False),
]
# Borders on the edge of a chunk of 4, inside one, and two in one; an id that comes back.
SEGMENTS = np.repeat([[3, 1, 3, 2, 5]], [4, 5, 1, 8, 1], axis=1) + np.array([[0], [10]])


def draw(seed=0, length=LENGTH):
    """q, k > 0 and v; the products differ much in size."""
    rng = np.random.default_rng(seed)
    widths = (WIDTH, WIDTH, VALUE)
    q, k, v = (rng.normal(size=(BATCH, length, HEADS, width)) for width in widths)
    return np.exp(q), np.exp(k), v


def reference(q, k, v, causal, normalise, segment_ids=None):
    """The sums of the definition, one pair of tokens at a time."""
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        total = 0.0
        for s in range(q.shape[1]):
            low, high = min(s, t), max(s, t)
            together = (
                segment_ids is None or (segment_ids[b, low : high + 1] == segment_ids[b, t]).all()
            )
            if together and (s <= t or not causal):
                weight = q[b, t, h] @ k[b, s, h]
                out[b, t, h] += weight * v[b, s, h]
                total += weight
        out[b, t, h] /= total if normalise else 1
    return out


@functools.cache
def compiled(form, causal, normalise, segmented, chunk_size=4):
    """Output, final state and, for random weights on both, all gradients."""

    def loss(inputs, segment_ids, weights):
        out, state = linear_attention(
            *inputs,
            causal=causal,
            normalise=normalise,
            segment_ids=segment_ids if segmented else None,
            form=form,
            chunk_size=chunk_size,
        )
        return jnp.sum(out * weights), (out, state)

    return jax.jit(jax.grad(loss, has_aux=True))


def as_float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("form", "causal"), FORMS)
def test_every_form_is_the_definition(form, causal, normalise, segmented):
    q, k, v = draw()
    ids = SEGMENTS if segmented else None
    expected = reference(q, k, v, causal, normalise, ids)
    weights = np.random.default_rng(1).normal(size=v.shape)
    gradients, (out, state) = compiled(form, causal, normalise, segmented)(
        as_float32(q, k, v), jnp.asarray(SEGMENTS), as_float32(weights)[0]
    )
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5 * abs(expected).max())
    for ours, theirs in zip(
        gradients, torch_gradients(q, k, v, weights, causal, normalise, ids), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=5e-5, atol=2e-5 * abs(theirs).max())
    if causal:
        last = slice(-1 if segmented else 0, None)
        wide = np.concatenate([v, np.ones((*v.shape[:-1], 1))], -1) if normalise else v
        sums = np.einsum("bshk,bshv->bhkv", k[:, last], wide[:, last])
        np.testing.assert_allclose(state, sums, rtol=2e-5, atol=2e-5 * abs(sums).max())
    else:
        assert state is None


def torch_gradients(q, k, v, weights, causal, normalise, segment_ids):
    """Gradients of the masked T x T form in float64."""
    q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    seen = torch.ones(LENGTH, LENGTH)
    if segment_ids is not None:
        lengths = np.diff(np.flatnonzero(np.diff(segment_ids[0], prepend=-1, append=-1)))
        seen = torch.block_diag(*(torch.ones(n, n) for n in lengths))
    if causal:
        seen = seen.tril()
    products = torch.einsum("bthk,bshk->bhts", q, k) * seen
    if normalise:
        products = products / products.sum(-1, keepdim=True)
    out = torch.einsum("bhts,bshv->bthv", products, v)
    (out * torch.tensor(weights)).sum().backward()
    return [x.grad.numpy() for x in (q, k, v)]


@pytest.mark.parametrize("form", ["chunked", "parallel", "recurrent"])
def test_a_state_continues_the_first_document_alone(form):
    q, k, v = draw()
    expected = reference(q, k, v, True, True, SEGMENTS)
    run = jax.jit(
        lambda q, k, v, ids, state: linear_attention(
            q, k, v, initial_state=state, segment_ids=ids, form=form, chunk_size=4
        )
    )
    found, state = [], None
    # The cut is inside the second document, so the third must start from nothing.
    for part in (slice(0, 7), slice(7, LENGTH)):
        inputs = as_float32(*(x[:, part] for x in (q, k, v)))
        out, state = run(*inputs, jnp.asarray(SEGMENTS[:, part]), state)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(state[..., -1], k[:, -1], rtol=2e-5)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    borders=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    chunk_size=st.sampled_from([1, 6, 64]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_documents_in_chunks_of_any_size(borders, chunk_size, causal, seed):
    q, k, v = draw(seed)
    ids = np.broadcast_to(np.cumsum(borders) % 2, (BATCH, LENGTH))
    _, (out, _) = compiled("chunked", causal, True, True, chunk_size)(
        as_float32(q, k, v), jnp.asarray(ids), jnp.zeros(v.shape)
    )
    expected = reference(q[:1, :, :1], k[:1, :, :1], v[:1, :, :1], causal, True, ids)
    np.testing.assert_allclose(out[:1, :, :1], expected, rtol=2e-5, atol=2e-5)


def test_leading_axes_vmap_and_bfloat16():
    q, k, v = as_float32(*draw())
    expected, _ = linear_attention(q, k, v, chunk_size=4)
    lead, state = linear_attention(*(x[:, None] for x in (q, k, v)), chunk_size=4)
    np.testing.assert_allclose(lead[:, 0], expected, rtol=1e-6)
    assert state.shape == (BATCH, 1, HEADS, WIDTH, VALUE + 1)
    single = jax.vmap(lambda q, k, v: linear_attention(q, k, v, chunk_size=4)[0])(q, k, v)
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6)
    small, state = linear_attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), chunk_size=4)
    assert small.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(small.astype(np.float32), expected, rtol=0.05, atol=0.05)


def test_features_of_no_weight_give_zeros_and_finite_gradients():
    q, k, v = as_float32(*draw())
    value, pull = jax.vjp(lambda *x: linear_attention(*x, chunk_size=4)[0], q, 0 * k, v)
    assert not value.any()
    assert all(jnp.isfinite(gradient).all() for gradient in pull(jnp.ones_like(v)))


@pytest.mark.parametrize("causal", [True, False])
def test_taylor_attention_approaches_softmax_attention(causal):
    """What the series leaves out is l^3 / 6, so halving the logits divides the error by 8."""
    q, k, v = (np.log(draw()[0]), np.log(draw()[1]), draw()[2])
    errors = []
    for scale in (0.08, 0.04):
        features = [taylor_features(x) for x in as_float32(q * scale, k)]
        out, _ = linear_attention(*features, *as_float32(v), causal=causal, chunk_size=4)
        heads_first = (torch.tensor(x).transpose(1, 2) for x in (q * scale, k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=causal, scale=1.0
        )
        errors.append(abs(out - exact.transpose(1, 2).numpy()).max())
    assert errors[0] < 0.05
    assert 6 < errors[0] / errors[1] < 10


@pytest.mark.parametrize("causal", [True, False])
def test_no_array_grows_with_the_square_of_the_length(causal):
    """Of the packed forward and backward pass; T x T would be a hundred times the bound."""
    length, size = 4096, 16
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, ids):
        out, _ = linear_attention(q, k, v, causal=causal, segment_ids=ids, chunk_size=size)
        return out.sum()

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*shapes, ids)
    assert length * size <= largest(traced.jaxpr) <= 2 * length * size


def largest(jaxpr):
    """The most elements that any array of a program has, loops included."""
    inner = (
        sub.jaxpr if hasattr(sub, "jaxpr") else sub
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for sub in (value if isinstance(value, (tuple, list)) else (value,))
        if hasattr(sub, "eqns") or hasattr(sub, "jaxpr")
    )
    own = (var.aval.size for equation in jaxpr.eqns for var in equation.outvars)
    return max(max(own, default=0), max(map(largest, inner), default=0))


STATE = jnp.zeros((BATCH, HEADS, WIDTH, VALUE + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "fast"}, "form='fast' is unknown; use one of chunked, parallel, recurrent"),
        (
            {"form": "recurrent", "causal": False},
            "causal=False: form='recurrent' is unknown; use one of chunked, parallel",
        ),
        ({"chunk_size": 0}, "linear_attention: chunk_size=0 must be at least 1"),
        (
            {"initial_state": STATE, "causal": False},
            r"initial_state \(2, 3, 5, 8\) holds earlier tokens, which only a causal call",
        ),
        ({"initial_state": STATE[:1]}, r"initial_state \(1, 3, 5, 8\) must be .* \(2, 3, 5, 8\)"),
        (
            {"initial_state": STATE, "normalise": False},
            r"initial_state \(2, 3, 5, 8\) must be .* \(2, 3, 5, 7\)",
        ),
        ({"segment_ids": jnp.zeros((2, 18), int)}, r"segment_ids \(2, 18\) must be .* \(2, 19\)"),
        ({"k": jnp.zeros((2, 18, 3, 5))}, r"k \(2, 18, 3, 5\) must be \(\*B, T, H, K\)"),
    ],
)
def test_bad_input_says_what_to_do(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arguments = dict(zip("qkv", as_float32(*draw()), strict=True)) | changes
    qkv = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=message):
        linear_attention(*qkv, **arguments)
