"""The ring against attention on one device, and what it sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmodels.ops import dot_product_attention
from jaxmodels.ops.ring_attention import _balanced, _unbalanced, ring_attention
from jaxmodels.training.communication import bytes_sent

HEADS, KV_HEADS = 6, 2
SPLIT = P(None, "sequence")


def inputs(length, dtype=jnp.float32):
    """Queries, keys, values and sinks; documents, one of which comes back later."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, HEADS, 5), (2, length, KV_HEADS, 5), (2, length, KV_HEADS, 7), (HEADS,)]
    ids = np.sort(rng.integers(0, 4, (2, length)))
    ids[:, -2:] = ids[:, :1]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], jnp.asarray(ids)


def ring(devices, **options):
    """`(q, k, v, sinks, ids) -> out` over so many devices."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("sequence",))

    def attend(q, k, v, sinks, ids):
        return ring_attention(q, k, v, sinks=sinks, segment_ids=ids, **options)

    specs = (SPLIT, SPLIT, SPLIT, P(), SPLIT)
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=SPLIT)


def one_device(q, k, v, sinks, ids, **options):
    return dot_product_attention(
        q, k, v, sinks=sinks, segment_ids=ids, implementation="naive", **options
    )


def with_gradients(attend, ids):
    """Output and gradients of a loss that sees every output with another factor."""

    def loss(*arrays):
        out = attend(*arrays, ids)
        return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


# Parts of an even length are exchanged if causal, those of 3 tokens are not.
CASES = [
    (4, 24, {"causal": True, "softcap": 3.0}),
    (2, 6, {"causal": True}),
    (4, 24, {"scale": 1.0}),
]


@pytest.mark.parametrize(("devices", "length", "options"), CASES)
def test_values_and_gradients_are_those_of_one_device(devices, length, options):
    arrays, ids = inputs(length)
    many = with_gradients(ring(devices, **options), ids)
    one = with_gradients(functools.partial(one_device, **options), ids)
    (_, out), gradients = many(*arrays)
    (_, expected), expected_gradients = one(*arrays)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-6)


def test_without_documents_and_sinks_it_sends_keys_and_values_alone():
    """Forwards P parts of keys and values a device, and no gathering anywhere."""
    (q, k, v, _), _ = inputs(32)
    mesh = Mesh(np.asarray(jax.devices()), ("sequence",))
    attend = jax.shard_map(ring_attention, mesh=mesh, in_specs=(SPLIT,) * 3, out_specs=SPLIT)
    compiled = jax.jit(attend).lower(q, k, v).compile()
    assert bytes_sent(compiled.as_text()) == {"collective-permute": k.nbytes + v.nbytes}
    expected = dot_product_attention(q, k, v, implementation="naive")
    np.testing.assert_allclose(compiled(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_once():
    """Sums of exponentials and of values are float32 all the way round."""
    (q, k, v, sinks), ids = inputs(24, jnp.bfloat16)
    out = jax.jit(ring(4, causal=True))(q, k, v, sinks, ids)
    exact = one_device(*(x.astype(jnp.float32) for x in (q, k, v, sinks)), ids, causal=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_a_causal_ring_gives_every_device_early_and_late_tokens():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("sequence",))
    tokens = jnp.arange(16)[None]

    def both(x):
        there = _balanced("sequence", x)
        return there, _unbalanced("sequence", there)

    there, back = jax.shard_map(both, mesh=mesh, in_specs=SPLIT, out_specs=(SPLIT, SPLIT))(tokens)
    parts = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    np.testing.assert_array_equal(there.reshape(4, 4), parts)
    np.testing.assert_array_equal(back, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": (1, 4, 4, 5)},
            r"q \(1, 4, 6, 5\), k \(1, 4, 4, 5\).*G must divide H",
        ),
        ({"v": (1, 3, 2, 5)}, "with the same N and T"),
        ({"segment_ids": (1, 3)}, r"segment_ids \(1, 3\) must be \(N, T\) = \(1, 4\)"),
        ({"sinks": (2,)}, r"sinks \(2,\) must be \(H,\) = \(6,\)"),
    ],
)
def test_bad_shapes(change, message):
    shapes = {"q": (1, 4, 6, 5), "k": (1, 4, 2, 5), "v": (1, 4, 2, 5), **change}
    arrays = {
        name: jnp.zeros(shape, jnp.int32 if name == "segment_ids" else jnp.float32)
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        ring_attention.__wrapped__(**arrays)
