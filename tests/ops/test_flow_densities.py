"""Timestep densities against SciPy, diffusers and the paper's formulas in float64."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from jaxtyping import TypeCheckError

from jaxmodels.ops.flow_densities import (
    MODE_SCALE_MAX,
    CosMap,
    LogitNormal,
    Mode,
    Uniform,
    parse_density,
    sample_timesteps,
)

T = np.linspace(0, 1, 53)[1:-1]


def logit_normal_oracle(mean, std):
    normal = scipy.stats.norm(mean, std)
    return (
        lambda t: normal.pdf(scipy.special.logit(t)) / (t * (1 - t)),
        lambda t: normal.cdf(scipy.special.logit(t)),
    )


def mode_oracle(s):
    def f(u):
        return 1 - u - s * (np.cos(np.pi * u / 2) ** 2 - 1 + u)

    def inverse(t):
        return scipy.optimize.brentq(lambda u: f(u) - t, 0, 1, xtol=1e-15, rtol=1e-15)

    def slope(u):
        return -1 - s * (1 - np.pi / 2 * np.sin(np.pi * u))

    pdf = np.vectorize(lambda t: abs(1 / slope(inverse(t))))
    cdf = np.vectorize(lambda t: 1 - inverse(t))  # f falls from 1 to 0
    return pdf, cdf


def cosmap_oracle():
    # u solves tan(pi u / 2) = t / (1 - t): equal signal-to-noise ratios.
    return (
        lambda t: compute_loss_weighting_for_sd3("cosmap", torch.tensor(t)).numpy(),
        lambda t: 2 / np.pi * np.arctan(t / (1 - t)),
    )


CASES = {
    "uniform": (Uniform(), np.ones_like, lambda t: t),
    "logit_normal": (LogitNormal(), *logit_normal_oracle(0.0, 1.0)),
    "logit_normal_shifted": (LogitNormal(-0.7, 0.43), *logit_normal_oracle(-0.7, 0.43)),
    "mode": (Mode(), *mode_oracle(1.29)),
    "mode_of_the_ends": (Mode(-0.83), *mode_oracle(-0.83)),
    "mode_flat": (Mode(0.0), *mode_oracle(0.0)),
    "cosmap": (CosMap(), *cosmap_oracle()),
}
every_density = pytest.mark.parametrize(("density", "pdf", "cdf"), CASES.values(), ids=CASES.keys())


@every_density
def test_density_equals_its_definition(density, pdf, cdf):
    np.testing.assert_allclose(density.density(jnp.float32(T)), pdf(T), rtol=2e-5)


@every_density
def test_density_integrates_to_one(density, pdf, cdf):
    def integrand(t):
        return np.float64(density.density(jnp.float32(t)))

    area, _ = scipy.integrate.fixed_quad(integrand, 0, 1, n=500)
    assert area == pytest.approx(1, abs=2e-5)


@every_density
def test_quantile_inverts_the_distribution_function(density, pdf, cdf):
    quantiles = np.float64(density.quantile(jnp.float32(T)))
    np.testing.assert_allclose(cdf(quantiles), T, atol=2e-6)


@every_density
def test_quantile_reaches_both_ends_and_stays_inside(density, pdf, cdf):
    t = density.quantile(jnp.linspace(0, 1, 10_007))
    assert t[0] == 0
    assert t[-1] == 1
    assert jnp.all((t >= 0) & (t <= 1))


@every_density
def test_density_outside_is_zero(density, pdf, cdf):
    np.testing.assert_array_equal(density.density(jnp.array([-0.1, 1.1, -7.0])), 0)


@every_density
def test_density_gradient(density, pdf, cdf):
    t = T[::10]
    expected = (pdf(t + 1e-5) - pdf(t - 1e-5)) / 2e-5
    slopes = jax.vmap(jax.grad(density.density))(jnp.float32(t))
    np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-3)


@every_density
def test_density_under_jit_and_vmap(density, pdf, cdf):
    t = jnp.float32(T).reshape(3, 17)
    expected = density.density(t)
    chex.assert_trees_all_close(jax.jit(density.density)(t), expected, rtol=1e-5)
    chex.assert_trees_all_close(jax.vmap(jax.vmap(density.density))(t), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("density", "limit"),
    [
        (Uniform(), 1.0),
        (LogitNormal(0.3, 2.0), 0.0),
        (Mode(1.29), 1 / 2.29),
        (Mode(-1.0), math.inf),
        (CosMap(), 2 / math.pi),
    ],
)
def test_density_at_the_ends_is_its_limit(density, limit):
    np.testing.assert_allclose(density.density(jnp.array([0.0, 1.0])), limit, rtol=1e-6)


def test_logit_normal_gradient_is_finite_at_the_ends():
    slopes = jax.vmap(jax.grad(LogitNormal().density))(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(slopes, 0)


def test_mode_at_its_lower_limit_is_the_arcsine_law():
    expected = scipy.stats.arcsine.pdf(T)
    np.testing.assert_allclose(Mode(-1.0).density(jnp.float32(T)), expected, rtol=2e-5)
    near_zero = jnp.array([1e-9, 1e-6])
    np.testing.assert_allclose(
        Mode(-1.0).density(near_zero), scipy.stats.arcsine.pdf(near_zero), rtol=1e-3
    )


@pytest.mark.parametrize("scale", [1.13, 1.4])
def test_mode_quantile_never_oversteps_by_rounding(scale):
    assert Mode(scale).quantile(jnp.array(1.0)) == 1


def test_mode_at_its_upper_limit_peaks_in_the_middle():
    pdf, _ = mode_oracle(MODE_SCALE_MAX - 1e-12)
    t = np.array([0.03, 0.31, 0.47, 0.62])
    np.testing.assert_allclose(Mode(MODE_SCALE_MAX).density(jnp.float32(t)), pdf(t), rtol=2e-4)
    assert Mode(MODE_SCALE_MAX).density(jnp.array(0.5)) > 1e3


@every_density
def test_samples_follow_the_density(density, pdf, cdf):
    t = sample_timesteps(jax.random.key(3), (71, 59), density)
    chex.assert_shape(t, (71, 59))
    assert t.dtype == jnp.float32
    assert scipy.stats.kstest(np.float64(t).ravel(), cdf).pvalue > 0.01


@every_density
def test_stratified_samples_take_one_from_each_share(density, pdf, cdf):
    t = sample_timesteps(jax.random.key(5), (13, 7), density, stratified=True)
    shares = np.sort(cdf(np.float64(t)).ravel()) * t.size
    # An edge may round to the neighbouring share.
    np.testing.assert_allclose(shares, np.arange(t.size) + 0.5, atol=0.5 + 1e-3)
    assert np.any(np.diff(np.float64(t).ravel()) < 0), "the shares are in random order"


@every_density
def test_stratified_samples_keep_the_density_at_every_position(density, pdf, cdf):
    keys = jax.random.split(jax.random.key(7), 3001)
    draw = jax.vmap(lambda key: sample_timesteps(key, (5,), density, stratified=True))
    t = np.float64(draw(keys))
    for position in range(5):
        assert scipy.stats.kstest(t[:, position], cdf).pvalue > 0.01


def test_same_key_same_timesteps():
    def draw(seed, stratified):
        return sample_timesteps(jax.random.key(seed), (5,), Uniform(), stratified=stratified)

    for stratified in (False, True):
        np.testing.assert_array_equal(draw(1, stratified), draw(1, stratified))
        assert np.all(draw(1, stratified) != draw(2, stratified))


def test_densities_are_values():
    assert LogitNormal(0.0, 1.0) == LogitNormal()
    assert hash(Mode(0.5)) == hash(Mode(0.5))


@pytest.mark.parametrize(
    ("text", "density"),
    [
        ("uniform", Uniform()),
        ("uniform()", Uniform()),
        ("logit_normal", LogitNormal()),
        ("logit_normal(-0.5)", LogitNormal(-0.5, 1.0)),
        (" logit_normal(0.0,1.2) ", LogitNormal(0.0, 1.2)),
        ("mode( 1e-1 )", Mode(0.1)),
        ("cosmap", CosMap()),
    ],
)
def test_parse_density(text, density):
    assert parse_density(text) == density


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logit-normal(0,1)", r"cannot read 'logit-normal\(0,1\)'.*logit_normal\(mean, std\)"),
        ("logitnormal", r"unknown density 'logitnormal'; did you mean 'logit_normal'\?.*cosmap"),
        ("beta(1,2)", r"unknown density 'beta'; known: uniform, logit_normal\(mean, std\), mode"),
        ("mode(1,2)", r"gives 2 numbers, but mode takes at most 1"),
        ("cosmap(1)", r"gives 1 numbers, but cosmap takes at most 0"),
        ("logit_normal(a,1)", r"'a,1' in 'logit_normal\(a,1\)' is not a list of numbers"),
        ("logit_normal(1,)", r"is not a list of numbers"),
        ("logit_normal(0,0)", r"LogitNormal: std=0.0 must be positive"),
        ("logit_normal(0,inf)", r"LogitNormal: std=inf must be positive and finite"),
        ("logit_normal(nan,1)", r"LogitNormal: mean=nan must be finite"),
        ("mode(1.76)", r"Mode: scale=1.76 is outside of \[-1, 2 / \(pi - 2\) = 1.7519\]"),
        ("mode(-1.01)", r"Mode: scale=-1.01 is outside"),
        ("mode(nan)", r"Mode: scale=nan is outside"),
        ("", r"cannot read ''"),
    ],
)
def test_parse_density_rejects(text, message):
    with pytest.raises(ValueError, match=message):
        parse_density(text)


def test_a_text_is_not_a_density():
    with pytest.raises(TypeCheckError):
        sample_timesteps(jax.random.key(0), (3,), "uniform")
