"""The inverse that every chunk of a delta rule needs, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.delta_chunks import inverse_of_unit_lower


def system(size, seed=0):
    rng = np.random.default_rng(seed)
    return np.tril(rng.uniform(-1, 1, size=(2, 3, size, size)) / np.sqrt(size), -1)


# One block, joined blocks, a size that cannot be halved often, and the trivial one.
@pytest.mark.parametrize("size", [1, 16, 64, 34])
def test_inverse_matches_numpy(size):
    lower = system(size)
    found = jax.jit(inverse_of_unit_lower)(jnp.asarray(lower, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(np.eye(size) + lower), atol=2e-6)


def test_derivatives_match_differences_forward_and_backward():
    lower, direction, weight = (system(34, seed) for seed in range(3))

    def numpy_value(step):
        return np.sum(weight * np.linalg.inv(np.eye(34) + lower + step * direction))

    expected = (numpy_value(1e-5) - numpy_value(-1e-5)) / 2e-5

    def value(lower):
        return jnp.vdot(jnp.asarray(weight, jnp.float32), inverse_of_unit_lower(lower))

    at, along = (jnp.asarray(x, jnp.float32) for x in (lower, direction))
    _, forward = jax.jit(lambda x, dx: jax.jvp(value, (x,), (dx,)))(at, along)
    backward = jnp.vdot(jax.jit(jax.grad(value))(at), along)
    np.testing.assert_allclose([forward, backward], expected, rtol=1e-4)
