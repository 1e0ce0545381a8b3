"""ReRoPE against its definition in torch float64, one rotation a pair of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels import ops
from jaxmodels.ops.rerope import naive_rerope_attention, rerope_attention
from jaxmodels.ops.rotary import rotary_angles, rotary_frequencies, rotate

B, T, H, K, V, WINDOW = 2, 13, 3, 10, 7, 4
PLACES = jnp.broadcast_to(jnp.arange(T), (B, T))
FREQUENCIES = rotary_frequencies(K, 53.0)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


Q, KEYS, VALUES = (draw(i, B, T, H, n) for i, n in enumerate((K, K, V)))
D_OUT = draw(3, B, T, H, V)


def definition(q, k, v, leak):
    """Pairs of channels as complex numbers; l = Re(q conj(k) exp(i f(t - s) w))."""
    half = K // 2
    w = 53.0 ** (-2 * torch.arange(half, dtype=torch.float64) / K)
    q, k = (torch.complex(x[..., :half], x[..., half:]) for x in (q, k))
    rows = []
    for t in range(T):
        logits = []
        for s in range(t + 1):
            d = t - s
            if d >= WINDOW:
                d = WINDOW if leak is None else WINDOW + (d - WINDOW) / leak
            turned = q[:, t] * k[:, s].conj() * torch.exp(1j * d * w)
            logits.append(turned.real.sum(-1) / K**0.5)
        weights = torch.softmax(torch.stack(logits, -1), -1)
        rows.append(torch.einsum("bhs,bshv->bhv", weights, v[:, : t + 1]))
    return torch.stack(rows, 1)


def ours(q, k, v, **options):
    options = {"causal": True, "rectify_at": WINDOW, **options}
    return rerope_attention(q, k, v, PLACES, PLACES, FREQUENCIES, **options)


@pytest.mark.parametrize("leak", [None, 2.5])
def test_values_and_gradients_by_definition(leak):
    @jax.jit
    def both(*arguments):
        out, pull = jax.vjp(lambda *x: ours(*x, leak=leak, block_size=5), *arguments)
        return out, pull(D_OUT)

    out, gradients = both(Q, KEYS, VALUES)
    inputs = [
        torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
        for x in (Q, KEYS, VALUES)
    ]
    expected = definition(*inputs, leak)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward(torch.tensor(np.asarray(D_OUT), dtype=torch.float64))
    for mine, x in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(mine, x.grad, rtol=1e-4, atol=1e-4)
    naive = naive_rerope_attention(Q, KEYS, VALUES, FREQUENCIES, rectify_at=WINDOW, leak=leak)
    np.testing.assert_allclose(naive, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"rectify_at": T}, {"leak": 1.0}])
def test_without_a_reach_it_is_rotary(options):
    """A window as long as the sequence, or a leak of one, changes nothing."""
    turned = (rotate(x, rotary_angles(PLACES, FREQUENCIES)) for x in (Q, KEYS))
    expected = ops.dot_product_attention(*turned, VALUES, causal=True)
    np.testing.assert_allclose(ours(Q, KEYS, VALUES, **options), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_may_say_what_is_seen():
    """As with a cache: keys in slots of their own, of which some are empty."""
    order = np.random.default_rng(5).permutation(T)
    mask = jnp.asarray(order[None, :] <= np.arange(T)[:, None])[None, None]
    places = jnp.broadcast_to(jnp.asarray(order), (B, T))
    out = rerope_attention(
        Q,
        KEYS[:, order],
        VALUES[:, order],
        PLACES,
        places,
        FREQUENCIES,
        rectify_at=WINDOW,
        mask=mask,
        layout="half",
    )
    np.testing.assert_allclose(out, ours(Q, KEYS, VALUES), rtol=1e-4, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="rerope_attention: rectify_at=0 must be at least 1"):
        ours(Q, KEYS, VALUES, rectify_at=0)
    with pytest.raises(ValueError, match=r"leak=0\.5 would make positions grow faster"):
        ours(Q, KEYS, VALUES, leak=0.5)
    with pytest.raises(ValueError, match="rectified to the left only; pass causal=True"):
        ours(Q, KEYS, VALUES, causal=False)
