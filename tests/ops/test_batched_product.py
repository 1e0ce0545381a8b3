"""Small matrices multiplied in a form of their own, against NumPy in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops.batched_product import batched_product, transposed

# Small matrices and much work; large matrices; little work.
SHAPES = [((3, 7), 90, 100, 110), ((2,), 300, 40, 310), ((5,), 4, 6, 8)]


def factors(batch, rows, inner, columns):
    rng = np.random.default_rng(0)
    shapes = (*batch, rows, inner), (*batch, inner, columns), (*batch, rows, columns)
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_match_numpy(shape):
    x, y, d_out = factors(*shape)
    out, pull_back = jax.vjp(batched_product, *(jnp.asarray(a, jnp.float32) for a in (x, y)))
    d_x, d_y = jax.jit(pull_back)(jnp.asarray(d_out, jnp.float32))
    exact = x @ y, d_out @ y.swapaxes(-1, -2), x.swapaxes(-1, -2) @ d_out
    for actual, expected in zip((out, d_x, d_y), exact, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_summed_in_what_is_preferred(shape):
    x, y, d_out = (jnp.asarray(a, jnp.bfloat16) for a in factors(*shape))

    def product(x, y):
        return batched_product(x, y, preferred_element_type=jnp.float32)

    out, pull_back = jax.vjp(product, x, y)
    assert out.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-4)
    assert [g.dtype for g in pull_back(d_out.astype(jnp.float32))] == [jnp.bfloat16] * 2
    assert batched_product(x, y).dtype == jnp.bfloat16


def test_only_small_matrices_with_much_work_are_followed_by_a_reduction():
    def reductions(shape):
        return str(jax.make_jaxpr(batched_product)(*factors(*shape)[:2])).count("reduce_max")

    assert [reductions(shape) for shape in SHAPES] == [1, 0, 0]


def test_what_is_not_finite_stays_what_and_where_it_is():
    """Compiled, where XLA's kernels for minima and maxima forget what is not a number."""
    x, y, _ = (jnp.asarray(a, jnp.float32) for a in factors(*SHAPES[0]))
    x = x.at[0, 0, 3].set(-jnp.inf).at[1, 1, 4, 5].set(jnp.inf).at[2, 2, 6, 7].set(jnp.nan)
    found = jax.jit(batched_product)(x, y)
    with np.errstate(invalid="ignore"):
        expected = np.asarray(x) @ np.asarray(y)
    np.testing.assert_array_equal(jnp.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(jnp.isfinite(found), np.isfinite(expected))


def test_transposed_is_not_made_part_of_a_product():
    x, y, d_out = (jnp.asarray(a, jnp.float32) for a in factors(*SHAPES[0]))
    np.testing.assert_array_equal(transposed(x), np.asarray(x).swapaxes(-1, -2))
    text = jax.jit(lambda x, d: transposed(x) @ d).lower(x, d_out).as_text()
    assert "LayoutConstraint" in text
    gradient = jax.make_jaxpr(lambda x, y: jax.vjp(batched_product, x, y)[1](d_out))(x, y)
    assert "layout_constraint" in str(gradient)


def test_shapes_are_named():
    x, y, _ = (jnp.asarray(a) for a in factors(*SHAPES[2]))
    as_users_run_it = inspect.unwrap(batched_product)
    with pytest.raises(ValueError, match=r"batched_product: x \(5, 4, 6\) and y \(1, 6, 8\)"):
        as_users_run_it(x, y[:1])
    with pytest.raises(ValueError, match=r"y \(5, 8, 6\) must be \(\*B, M, K\) and \(\*B, K, N\)"):
        as_users_run_it(x, y.swapaxes(1, 2))
