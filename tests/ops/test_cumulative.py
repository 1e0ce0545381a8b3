"""Running sums and maxima against those of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops import cumulative as module
from jaxmodels.ops.cumulative import cumulative


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_equals_numpy_and_its_gradient(monkeypatch, device):
    """The gradient of a running sum is the running sum of the gradient from the other end."""
    monkeypatch.setattr(module, "platform", lambda: device)
    x, cotangent = np.random.default_rng(0).normal(size=(2, 2, 5, 7)).astype(np.float32)

    @jax.jit
    def run(x, cotangent):
        def total(x):
            return cumulative(jnp.add, x, 1, initial=0.0)

        backwards = cumulative(jnp.maximum, x, 2, initial=-jnp.inf, reverse=True)
        out, pull_back = jax.vjp(total, x)
        return backwards, out, *pull_back(cotangent)

    backwards, out, gradient = run(x, cotangent)
    expected = np.maximum.accumulate(x[..., ::-1], axis=2)[..., ::-1]
    np.testing.assert_array_equal(backwards, expected)
    np.testing.assert_allclose(out, np.cumsum(x, axis=1), rtol=1e-5, atol=1e-6)
    expected = np.cumsum(cotangent[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
