"""Recurrences on eight devices against a token at a time on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.delta_rule import gated_delta_rule, unit_length
from jaxmodels.ops.gated_linear_attention import gated_linear_attention
from jaxmodels.ops.linear_attention import linear_attention
from jaxmodels.ops.retention import retention
from jaxmodels.training.communication import bytes_sent
from jaxmodels.training.sharding import make_mesh

BATCH, HEADS, WIDTH, VALUES = 4, 2, 5, 3
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def arrays(length):
    tokens = BATCH, length, HEADS
    q, k = unit_length(normal(*tokens, WIDTH)), unit_length(normal(*tokens, WIDTH))
    gates = -jnp.abs(normal(*tokens, WIDTH)), jax.nn.sigmoid(normal(*tokens))
    return q, k, normal(*tokens, VALUES), *gates


def delta(q, k, v, gate, beta, **options):
    return gated_delta_rule(q, k, v, gate[..., 0], beta, **options)


def gated(q, k, v, gate, beta, **options):
    return gated_linear_attention(q, k, v, gate, **options)


def fading(q, k, v, gate, beta, **options):
    return retention(q, k, v, jnp.array([0.9, 0.7]), **options)


def normalised(q, k, v, gate, beta, **options):
    return linear_attention(jnp.abs(q), jnp.abs(k), v, **options)


def both(op, documents, **options):
    """Outputs, last state and gradients, with a state before the first token."""

    def loss(state, *arrays):
        found = op(*arrays, initial_state=state, segment_ids=documents, **options)
        return sum(jnp.sum(jnp.sin(x)) for x in found), found

    return jax.jit(jax.value_and_grad(loss, tuple(range(6)), has_aux=True))


# 24 tokens on 8 devices are 3 each: borders of documents fall on those of devices too.
@pytest.mark.parametrize(
    ("op", "mesh", "with_documents"),
    [
        (delta, "sequence=8", True),
        (gated, "data=2,sequence=4", True),
        (fading, "sequence=4,tensor=2", False),
        (normalised, "sequence=8", True),
    ],
)
def test_values_states_and_gradients_are_those_of_the_definition(op, mesh, with_documents):
    documents = None
    if with_documents:
        lengths = [[3, 10, 11], [24], [12, 12], [1, 1, 22]]
        documents = jnp.stack([jnp.repeat(5 + jnp.arange(len(n)), jnp.array(n)) for n in lengths])
    inputs = arrays(24)
    columns = VALUES + (op is normalised)
    state = jnp.abs(normal(BATCH, HEADS, WIDTH, columns))
    (_, expected), expected_gradients = both(op, documents, form="recurrent")(state, *inputs)
    with jax.set_mesh(make_mesh(mesh)):
        (_, found), gradients = both(op, documents, chunk_size=2)(state, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_what_is_sent_does_not_grow_with_the_sequence():
    def sent(length):
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(length)]
        mesh = make_mesh("sequence=8")
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))
        with jax.set_mesh(mesh):
            call = jax.jit(lambda *a: delta(*a)[0], in_shardings=(split,) * 5, out_shardings=split)
            return bytes_sent(call.lower(*inputs).compile().as_text())

    states = 4 * BATCH * HEADS * WIDTH * (WIDTH + VALUES)
    assert sent(64) == sent(128) == {"all-gather": 7 * states}
