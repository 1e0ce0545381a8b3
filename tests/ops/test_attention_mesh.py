"""Attention that is asked for on a mesh: with all that changes how it is spread."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops import attention_fused, dot_product_attention
from jaxmodels.ops.attention_mesh import attend_on_mesh
from jaxmodels.ops.attention_naive import naive_attention
from jaxmodels.training.sharding import make_mesh

RNG = np.random.default_rng(0)
BATCH, LENGTH, HEADS = 4, 10, 8


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# A ring that is filled up; what a ring does not take; examples that do not divide.
CASES = {
    "ring": (BATCH, LENGTH, {"causal": True, "sinks": normal(HEADS), "softcap": 3.0}),
    "window": (BATCH, LENGTH, {"causal": True, "window": 3}),
    "bias and mask": (
        BATCH,
        LENGTH,
        {"bias": normal(HEADS, 1, LENGTH), "mask": normal(BATCH, 1, LENGTH, LENGTH) > -1},
    ),
    "other keys": (3, 7, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mesh_changes_no_value(name):
    """Two groups of key heads on four devices, which hold copies of them."""
    examples, num_keys, options = CASES[name]
    q = normal(examples, LENGTH, HEADS, 5)
    k, v = normal(examples, num_keys, 2, 5), normal(examples, num_keys, 2, 3)
    expected = dot_product_attention(q, k, v, implementation="naive", **options)
    for text in ("data=2,tensor=4", "sequence=4,tensor=2") if name != "other keys" else ("data=8",):
        with jax.set_mesh(make_mesh(text)):
            found = jax.jit(lambda *qkv: dot_product_attention(*qkv, **options))(q, k, v)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_implementation_that_is_named_is_left_alone():
    q = normal(BATCH, LENGTH, HEADS, 5)

    def program(**options):
        with jax.set_mesh(make_mesh("data=4,tensor=2")):
            return str(jax.make_jaxpr(lambda q: dot_product_attention(q, q, q, **options))(q))

    assert "shard_map" in program()
    assert "shard_map" not in program(implementation="blocked")


def test_gradients_of_a_kernel_that_says_nothing_of_axes(monkeypatch):
    """As those of platforms, which are not there to be tried; sinks are shared by all examples."""
    kernel = attention_fused.Kernel(None, naive_attention)
    monkeypatch.setitem(attention_fused.KERNELS, "example", kernel)
    arrays = normal(BATCH, LENGTH, HEADS, 5), *(normal(BATCH, LENGTH, 2, 5) for _ in "kv")
    options = {"window": (2, 0), "scale": 1.0, "softcap": None}

    def gradients(attend):
        def loss(q, k, v, sinks):
            return jnp.sum(jnp.sin(attend(q, k, v, None, None, None, sinks, **options)))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays, CASES["ring"][2]["sinks"])

    expected = gradients(naive_attention)
    with jax.set_mesh(make_mesh("data=2,sequence=2,tensor=2")):
        found = gradients(functools.partial(attend_on_mesh, naive_attention))
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
