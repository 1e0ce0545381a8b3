import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.checks import require_shape, require_within


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, np.array([0.0, 1.0]), jnp.asarray([[0.25]])])
def test_values_within_pass(value):
    require_within("f", "x", value, 0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "open_low", "message"),
    [
        (1.5, False, r"f: x holds 1\.5, outside \[0, 1\]"),
        (jnp.asarray([[0.5, -2.0]]), False, r"f: x holds -2, outside \[0, 1\]"),
        (np.array([1.0, 0.0]), True, r"f: x holds 0, outside \(0, 1\]"),
        (float("nan"), False, r"f: x holds nan, outside \[0, 1\]"),
    ],
)
def test_values_outside_are_named(value, open_low, message):
    with pytest.raises(ValueError, match=message):
        require_within("f", "x", value, 0.0, 1.0, open_low=open_low)


def test_values_unknown_while_tracing_pass():
    def f(x):
        require_within("f", "x", x, 0.0, 1.0)
        return 2 * x

    assert jax.jit(f)(3.0) == 6.0


def test_shapes():
    x = jnp.zeros((2, 3))
    require_shape("f", "x", x, (2, 3), "(B, T)")
    with pytest.raises(ValueError, match=r"f: x \(2, 3\) must be \(B, W\) = \(2, 5\)"):
        require_shape("f", "x", x, (2, 5), "(B, W)")
