"""The Fréchet distance against its textbook form and closed cases."""

import inspect

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.metrics import frechet_distance


def clouds(rows=(211, 173), width=7, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
        for n in rows
    ]


def textbook(a, b):
    """The definition, with covariances and a general matrix root."""
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(sigma_a + sigma_b - 2 * root)


def exact_moments(mean, deviations, rows=10):
    """Points whose sample mean is `mean` and whose sample covariance is diag(deviations^2)."""
    width = len(deviations)
    basis = scipy.linalg.hadamard(1 << (rows * width).bit_length())[:, 1 : 1 + width]
    return mean + basis * deviations * np.sqrt((len(basis) - 1) / len(basis))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.tuples(st.integers(13, 211), st.integers(13, 211)),
    width=st.sampled_from([2, 3, 5, 11]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition_with_a_matrix_root(rows, width, seed):
    a, b = clouds(rows, width, seed)
    np.testing.assert_allclose(frechet_distance(a, b), textbook(a, b), rtol=1e-7)


def test_diagonal_gaussians_have_a_closed_form():
    mean_a, mean_b = np.array([1.0, -2.0, 3.0]), np.array([0.5, 2.0, 3.0])
    dev_a, dev_b = np.array([1.0, 2.0, 5.0]), np.array([3.0, 0.5, 5.0])
    got = frechet_distance(exact_moments(mean_a, dev_a), exact_moments(mean_b, dev_b))
    want = np.sum((mean_a - mean_b) ** 2) + np.sum((dev_a - dev_b) ** 2)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_is_a_symmetric_squared_distance_that_ignores_rotation_order_and_origin():
    a, b = clouds()
    distance = frechet_distance(a, b)
    rotation = scipy.stats.ortho_group.rvs(7, random_state=0)
    shift = np.arange(7.0)
    np.testing.assert_allclose(frechet_distance(b, a), distance, rtol=1e-12)
    turned = frechet_distance(a @ rotation + shift, b @ rotation + shift)
    np.testing.assert_allclose(turned, distance, rtol=1e-10)
    np.testing.assert_allclose(frechet_distance(3 * a, 3 * b), 9 * distance, rtol=1e-12)
    np.testing.assert_allclose(frechet_distance(a[::-1], b), distance, rtol=1e-12)


def test_is_zero_for_the_same_cloud_and_the_squared_shift_for_a_moved_one():
    a, _ = clouds()
    assert 0 <= frechet_distance(a, a) < 1e-12
    np.testing.assert_allclose(frechet_distance(a, a + 2.0), 4 * 7, rtol=1e-12)


def test_fewer_rows_than_columns_and_constant_columns_are_fine():
    # Singular covariances, where a general matrix root returns noise or complex numbers.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 13)), rng.normal(size=(3, 13))
    a[:, 2] = b[:, 2] = 7.0
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    overlap = np.sqrt(np.linalg.eigvals(sigma_a @ sigma_b).real.clip(0)).sum()
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(sigma_a + sigma_b) - 2 * overlap
    np.testing.assert_allclose(frechet_distance(a, b), want, rtol=1e-5)
    assert 0 <= frechet_distance(a, a) < 1e-12


def test_float32_far_from_the_origin_keeps_its_digits():
    a, b = (cloud.astype(np.float32) + np.float32(1000) for cloud in clouds())
    want = textbook(a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(frechet_distance(a, b), want, rtol=1e-7)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 2)), r"\(5, 3\) and features_b \(5, 2\) differ in width"),
        (np.zeros((1, 3)), np.zeros((5, 3)), r"features_a has shape \(1, 3\).*two rows"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), r"features_b holds NaN or infinity"),
    ],
)
def test_bad_features_are_named(a, b, message):
    with pytest.raises(ValueError, match=rf"frechet_distance: .*{message}"):
        inspect.unwrap(frechet_distance)(a, b)  # as users run it, without type checks
