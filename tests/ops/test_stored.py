"""The fence changes no value, holds on CPUs, and is absent elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.ops import stored as module
from jaxmodels.ops.stored import stored


def neighbours(x):
    """Reads what it makes twice, from the other order of axes."""
    made = stored(jnp.sin(x).T)
    return made[:-1] * made[1:]


def test_changes_no_value_and_no_gradient():
    x = jnp.linspace(-2, 2, 15).reshape(3, 5)
    expected = np.sin(x).T[:-1] * np.sin(x).T[1:]
    np.testing.assert_allclose(jax.jit(neighbours)(x), expected, rtol=1e-6)
    mapped = jax.jit(jax.vmap(neighbours))(jnp.stack([x, x]))
    np.testing.assert_allclose(mapped[1], expected, rtol=1e-6)
    slope = jax.jit(jax.grad(lambda x: neighbours(x).sum()))(x)
    step = 1e-3 * jnp.cos(jnp.arange(15.0).reshape(3, 5))
    change = (neighbours(x + step) - neighbours(x - step)).sum() / 2
    np.testing.assert_allclose((slope * step).sum(), change, rtol=1e-3)


def kernels(function, x) -> int:
    """How many the compiled function consists of."""
    text = jax.jit(function).lower(x).compile().as_text()
    return text[text.index("ENTRY") :].count("kind=kLoop")


def test_holds_on_cpu_alone(monkeypatch):
    x = jnp.ones((30, 50))
    assert kernels(neighbours, x) == 2
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    assert kernels(lambda x: neighbours(x), x) == 1
