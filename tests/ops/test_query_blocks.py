"""Attention with logits of any kind, in blocks, against dense attention in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.query_blocks import attend_in_blocks, dot_products

B, T, S, H, G, K, V = 2, 7, 11, 6, 3, 5, 13


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


Q, KEYS, VALUES = draw(0, B, T, H, K), draw(1, B, S, G, K), draw(2, B, S, G, V)
D_OUT, TEMPERATURE = draw(3, B, T, H, V), jnp.float32(0.7)
IDS = (
    np.repeat([[0, 1, 2]] * B, [2, 3, 2], axis=1),
    np.repeat([[0, 1, 2]] * B, [4, 3, 4], axis=1),
)
MASK = np.random.default_rng(4).random((B, 1, T, S)) < 0.6
MASK[1, 0, 3] = False  # one query sees nothing
PLACES = np.arange(T)[:, None] + S - T
KEY_PLACES = np.arange(S)[None]
CASES = {
    "causal": ({"causal": True}, PLACES >= KEY_PLACES),
    "window": (
        {"window": (3, 2)},
        (KEY_PLACES - PLACES <= 2) & (PLACES - KEY_PLACES <= 3),
    ),
    "causal window": (
        {"window": 3, "causal": True},
        (PLACES >= KEY_PLACES) & (PLACES - KEY_PLACES <= 3),
    ),
    "mask": ({"mask": jnp.asarray(MASK)}, MASK),
    "documents": (
        {"segment_ids": tuple(map(jnp.asarray, IDS))},
        (IDS[0][:, :, None] == IDS[1][:, None, :])[:, None],
    ),
    "mask of keys": ({"mask": jnp.asarray(MASK[:, :, :1])}, MASK[:, :, :1]),
    "everything": ({}, np.ones((1, 1))),
}


def ours(q, k, v, temperature, **options):
    def logits(rows):
        return dot_products(rows, k, scale=0.3, softcap=2.0) * temperature

    return attend_in_blocks(logits, q, v, **options)


def theirs(q, k, v, temperature, seen, sinks=None):
    """In float64, with all logits at once; zeros where nothing is seen."""
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    logits = 2.0 * torch.tanh(torch.einsum("bthk,bshk->bhts", q, k) * 0.3 / 2.0) * temperature
    seen = torch.tensor(np.broadcast_to(seen, logits.shape).copy())
    top = torch.exp(logits) * seen
    total = top.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks)[:, None, None]
    weights = top / torch.where(total == 0, 1.0, total)
    return torch.einsum("bhts,bshv->bthv", weights, v)


@pytest.mark.parametrize(("case", "block_size"), [*((case, 3) for case in CASES), ("mask", 64)])
def test_values_and_gradients(case, block_size):
    options, seen = CASES[case]
    sinks = draw(5, H) if case == "mask of keys" else None

    @jax.jit
    def pulled(*arguments):
        out, pull = jax.vjp(
            lambda *x: ours(*x, sinks=sinks, block_size=block_size, **options), *arguments
        )
        return out, pull(D_OUT)

    out, gradients = pulled(Q, KEYS, VALUES, TEMPERATURE)
    inputs = [
        torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
        for x in (Q, KEYS, VALUES, TEMPERATURE)
    ]
    extra = None if sinks is None else torch.tensor(np.asarray(sinks), dtype=torch.float64)
    expected = theirs(*inputs, seen, extra)
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward(torch.tensor(np.asarray(D_OUT), dtype=torch.float64))
    for mine, x in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(mine, x.grad, rtol=1e-4, atol=1e-4)


def test_sinks_take_a_share_of_the_weight():
    """Equal logits of n keys and a sink of log(n) leave half of the weight to the values."""
    sinks = jnp.full(H, jnp.log(S))
    out = attend_in_blocks(lambda q: jnp.zeros((B, H, q.shape[1], S)), Q, VALUES, sinks=sinks)
    expected = np.repeat(np.mean(VALUES, axis=1, keepdims=True) / 2, H // G, axis=2)
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=1e-5, atol=1e-6)


def test_vmap_and_dtype():
    def one(q, k, v):
        out = ours(q[None], k[None], v[None], TEMPERATURE, causal=True, block_size=3)
        return out[0]

    whole = ours(Q, KEYS, VALUES, TEMPERATURE, causal=True)
    np.testing.assert_allclose(jax.vmap(one)(Q, KEYS, VALUES), whole, rtol=1e-5, atol=1e-6)
    halves = (x.astype(jnp.bfloat16) for x in (Q, KEYS, VALUES))
    out = ours(*halves, TEMPERATURE, causal=True, block_size=3)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), whole, atol=0.05)


def test_no_array_of_all_pairs():
    """Forward and backward: the largest array grows with T, not with its square."""
    length = 1_024
    q, k, v = (jnp.zeros((1, length, 1, 4)) for _ in range(3))

    def loss(q, k, v):
        return ours(q, k, v, TEMPERATURE, causal=True, block_size=32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length * length / 4


def test_bad_input():
    def call(**options):
        return ours(Q, KEYS, VALUES, TEMPERATURE, **options)

    with pytest.raises(ValueError, match="attend_in_blocks: block_size=0 must be at least 1"):
        call(block_size=0)
    with pytest.raises(ValueError, match=r"window=\(3, 1\) looks to the right"):
        call(causal=True, window=(3, 1))
    with pytest.raises(ValueError, match=r"mask \(1, 1, 7, 10\) must be broadcastable"):
        call(mask=jnp.ones((T, S - 1), bool))
    with pytest.raises(ValueError, match=r"segment_ids \(2, 7\) of queries and \(2, 7\) of keys"):
        call(segment_ids=jnp.asarray(IDS[0]))
