"""Experts on many devices against all of them on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.expert_parallel import dropless_on_mesh
from jaxmodels.ops.experts import dropless_experts
from jaxmodels.training.communication import bytes_sent
from jaxmodels.training.sharding import make_mesh

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS, CHOICES = 8, 6, 5, 6, 4, 2
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(0.5 * RNG.normal(size=shape), jnp.float32)


def arguments():
    """Expert 2 has no token, and expert 3 nearly all of the last examples."""
    choices = RNG.permuted(np.tile([0, 1, 3], (BATCH, LENGTH, 1)), axis=-1)[..., :CHOICES]
    choices[4:, :, 0], choices[4:, :, 1] = 3, 1
    matrices = normal(EXPERTS, WIDTH, HIDDEN), normal(EXPERTS, WIDTH, HIDDEN)
    down = normal(EXPERTS, HIDDEN, WIDTH)
    weights = jnp.abs(normal(BATCH, LENGTH, CHOICES))
    return (normal(BATCH, LENGTH, WIDTH), weights, *matrices, down), jnp.asarray(choices)


def with_gradients(run):
    def loss(choices, x, weights, *matrices):
        out = run(x, weights, choices, *matrices)
        return jnp.sum(jnp.sin(out) * jnp.arange(1, out.size + 1).reshape(out.shape)), out

    return jax.jit(jax.value_and_grad(loss, (1, 2, 3, 4, 5), has_aux=True))


def alone(x, weights, choices, *matrices):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, weights, choices))
    return dropless_experts(*flat, *matrices).reshape(x.shape)


@pytest.mark.parametrize("text", ["expert=4,fsdp=2", "expert=2,sequence=2,tensor=2", "data=8"])
def test_values_and_gradients_are_those_of_one_device(text):
    floats, choices = arguments()
    (_, expected), expected_gradients = with_gradients(alone)(choices, *floats)
    with jax.set_mesh(make_mesh(text)):
        compiled = with_gradients(dropless_on_mesh).lower(choices, *floats).compile()
    (_, out), gradients = compiled(choices, *floats)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    # Tokens travel if experts are apart, and stay where they are if not.
    assert ("all-to-all" in bytes_sent(compiled.as_text())) == ("expert" in text)
