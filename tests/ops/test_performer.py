"""The Performer's attention against its sums of random features in float64, and its limits."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from jaxmodels.ops.feature_maps import gaussian_projection
from jaxmodels.ops.performer import empty_performer_state, performer_attention

BATCH, LENGTH, HEADS, WIDTH, VALUE, FEATURES = 2, 19, 3, 5, 7, 11
SEGMENTS = np.repeat([[3, 1, 3, 2, 5]], [4, 5, 1, 8, 1], axis=1) + np.array([[0], [10]])
CASES = [
    ("positive", "chunked", True, True),
    ("positive", "chunked", True, False),
    ("positive", "chunked", False, True),
    ("positive", "chunked", False, False),
    ("positive", "parallel", True, True),
    ("positive", "parallel", False, True),
    ("positive", "recurrent", True, True),
    ("trigonometric", "chunked", True, True),
    ("trigonometric", "chunked", False, True),
]


def draw(seed=0, length=LENGTH):
    rng = np.random.default_rng(seed)
    widths = (WIDTH, WIDTH, VALUE)
    return [rng.normal(size=(BATCH, length, HEADS, width)) for width in widths]


def projection(features=FEATURES, seed=0):
    return gaussian_projection(jax.random.key(seed), features, WIDTH)


def as_float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def reference(q, k, v, kernel, causal, segment_ids=None):
    """Features and quotient as the paper writes them, in torch's float64, T x T."""
    w = torch.tensor(np.asarray(projection(), np.float64))

    def features(x):
        x = x / WIDTH**0.25
        square = (x**2).sum(-1, keepdim=True) / 2
        if kernel == "positive":
            return torch.exp(x @ w.T - square)
        return torch.exp(square) * torch.cat([torch.cos(x @ w.T), torch.sin(x @ w.T)], -1)

    seen = torch.ones(q.shape[1], q.shape[1])
    if segment_ids is not None:
        lengths = np.diff(np.flatnonzero(np.diff(segment_ids[0], prepend=-1, append=-1)))
        seen = torch.block_diag(*(torch.ones(n, n) for n in lengths))
    if causal:
        seen = seen.tril()
    products = torch.einsum("bthm,bshm->bhts", features(q), features(k)) * seen
    products = products / products.sum(-1, keepdim=True)
    return torch.einsum("bhts,bshv->bthv", products, v)


@functools.cache
def compiled(kernel, form, causal, segmented):
    def loss(inputs, segment_ids, weights):
        out, state = performer_attention(
            *inputs,
            projection(),
            kernel=kernel,
            causal=causal,
            segment_ids=segment_ids if segmented else None,
            form=form,
            chunk_size=4,
        )
        return jnp.sum(out * weights), (out, state)

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize(("kernel", "form", "causal", "segmented"), CASES)
def test_every_form_is_the_definition(kernel, form, causal, segmented):
    # Sines and cosines of short vectors add up to sums well away from zero.
    q, k, v = (x * (1 if kernel == "positive" else 0.3) for x in draw())
    weights = np.random.default_rng(1).normal(size=v.shape)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    expected = reference(*leaves, kernel, causal, SEGMENTS if segmented else None)
    (expected * torch.tensor(weights)).sum().backward()
    gradients, (out, state) = compiled(kernel, form, causal, segmented)(
        as_float32(q, k, v), jnp.asarray(SEGMENTS), as_float32(weights)[0]
    )
    np.testing.assert_allclose(out, expected.detach(), rtol=5e-5, atol=5e-5)
    for ours, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-4, atol=5e-5 * abs(leaf.grad).max())
    assert (state is None) == (not causal)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_a_state_continues_the_first_document_alone(form):
    q, k, v = draw()
    expected = reference(*map(torch.tensor, (q, k, v)), "positive", True, SEGMENTS)
    run = jax.jit(
        lambda q, k, v, ids, state: performer_attention(
            q, k, v, projection(), initial_state=state, segment_ids=ids, form=form, chunk_size=4
        )
    )
    found = []
    state = empty_performer_state(BATCH, HEADS, features=FEATURES, width=VALUE)
    for part in (slice(0, 7), slice(7, LENGTH)):
        inputs = as_float32(*(x[:, part] for x in (q, k, v)))
        out, state = run(*inputs, jnp.asarray(SEGMENTS[:, part]), state)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=5e-5, atol=5e-5)


def test_the_error_against_softmax_attention_falls_with_the_features():
    """16 times as many features: a quarter of the error, over 128 draws with fixed keys."""
    q, k, v = (0.3 * x[:1, :, :1] for x in draw())
    heads_first = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    exact = exact.transpose(1, 2).numpy()
    inputs = as_float32(q, k, v)
    attend = jax.jit(jax.vmap(lambda p: performer_attention(*inputs, p, form="parallel")[0]))
    errors = []
    for features in (64, 1024):
        projections = jax.random.normal(jax.random.key(3), (128, features, WIDTH))
        out = attend(projections)
        errors.append(np.sqrt(np.mean((out - exact[None]) ** 2)))
    assert errors[1] < 0.01
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.2)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_any_length_are_finite_and_right(causal):
    """Factors from exp(-1800) to exp(20): without setting them off, 0 / 0 and overflow."""
    q, k, v = draw()
    k[:, 3:9] *= 25
    k[:, 12:] *= 60
    expected = reference(*map(torch.tensor, (q, k, v)), "positive", causal)
    gradients, (out, _) = compiled("positive", "chunked", causal, False)(
        as_float32(q, k, v), jnp.asarray(SEGMENTS), jnp.ones(v.shape)
    )
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_a_large_key_changes_nothing_before_it():
    """Bit for bit, which one maximum over all keys would not do."""
    q, k, v = as_float32(*draw())
    run = compiled("positive", "chunked", True, False)
    before, after = (
        run([q, keys, v], jnp.asarray(SEGMENTS), jnp.ones_like(v))[1][0]
        for keys in (k, k.at[:, 14].set(3 * projection()[0]))
    )
    np.testing.assert_array_equal(before[:, :14], after[:, :14])
    assert jnp.any(before[:, 14:] != after[:, 14:])


def test_vmap_and_bfloat16():
    q, k, v = as_float32(*draw())
    run = jax.jit(lambda *x: performer_attention(*x, projection(), chunk_size=4))
    expected, _ = run(q, k, v)
    single = jax.jit(jax.vmap(lambda *x: run(*x)[0]))(q, k, v)
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)
    small, state = run(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert small.dtype == jnp.bfloat16 and state.sums.dtype == jnp.float32
    np.testing.assert_allclose(small.astype(np.float32), expected, rtol=0.05, atol=0.1)


STATE = empty_performer_state(BATCH, HEADS, features=FEATURES, width=VALUE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "cosine"}, "kernel='cosine' is unknown; use one of positive, trigonometric"),
        ({"form": "fast"}, "form='fast' is unknown"),
        ({"k": jnp.zeros((2, 19, 3, 4))}, r"q \(2, 19, 3, 5\) and k \(2, 19, 3, 4\) must both"),
        ({"projection": jnp.zeros((11, 4))}, r"projection \(11, 4\) must be \(M, K\)"),
        ({"causal": False, "initial_state": STATE}, "initial_state contradicts causal=False"),
        (
            {"initial_state": STATE._replace(log_scale=STATE.log_scale[:1])},
            r"initial_state.log_scale \(1, 3\) must be \(\*B, H\) = \(2, 3\)",
        ),
        ({"initial_state": STATE._replace(sums=STATE.sums[:1])}, r"\(1, 3, 11, 8\) must be"),
    ],
)
def test_bad_input_says_what_to_do(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arguments = dict(zip("qkv", as_float32(*draw()), strict=True))
    arguments |= {"projection": projection()} | changes
    inputs = [arguments.pop(name) for name in ("q", "k", "v", "projection")]
    with pytest.raises(ValueError, match=message):
        performer_attention(*inputs, **arguments)
