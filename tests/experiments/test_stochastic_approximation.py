"""The experiment on step sizes: its noise, its trends, its verdict, and a short run."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

NAME = "stochastic_approximation.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def test_the_noise_has_the_tails_it_promises(script):
    draws = np.asarray(script["heavy_noise"](jax.random.key(0), (200_000,), 3.0), np.float64)
    assert np.abs(draws).min() >= 1 and abs(np.mean(draws > 0) - 0.5) < 0.01
    for level in (2, 4):
        assert np.mean(np.abs(draws) > level) == pytest.approx(level**-3.0, rel=0.05)


def test_exponents_and_the_verdict_follow_the_distances(script):
    config, conclude = script["Config"](powers=(0.0, 0.75)), script["conclude"]

    def falling(power):
        early, late = np.full((5, 3), 9.0), 2.0 ** (-power * np.arange(6))[:, None]
        return np.concatenate([early, late * [0.1, 1.0, 50.0]])  # the median is the middle one

    assert script["exponent"](falling(0.25)) == pytest.approx(-0.25)
    descent = {(0.0, False): np.ones(2)}
    good = {0.0: falling(0.0), 0.75: falling(0.3)}
    assert conclude(config, good, descent, 0.0).holds
    assert not conclude(config, {**good, 0.75: falling(0.0)}, descent, 0.0).holds
    assert not conclude(config, {**good, 0.0: falling(0.3)}, descent, 0.0).holds


def test_a_short_run_measures_what_it_promises(script, tmp_path):
    config = script["Config"](
        powers=(0.0, 0.75, 1.0, 1.5), descent_powers=(0.0, 1.0), octaves=10, num_runs=64, epochs=20
    )
    result = script["main"](config, tmp_path)
    measured = result.measured
    # The largest of N draws grows as N^(1 / tail), and is taken times the step.
    assert measured["power_0_exponent_of_the_farthest"] == pytest.approx(1 / 2.2, abs=0.1)
    assert measured["power_0.75_exponent_of_the_farthest"] == pytest.approx(-0.3, abs=0.15)
    # Summable steps end where the product of 1 - a_n leaves them, give or take the noise.
    factor = np.prod(1 - 0.6 * np.arange(1, 1025) ** -1.5)
    stuck = measured["power_1.5_farthest_in_the_last_octave"]
    assert stuck == pytest.approx(30 * factor, rel=0.5)
    assert result.holds
    assert measured["error_of_the_incremental_mean"] < 2e-3
    # Averaging helps constant steps, and falling ones hardly need it.
    assert (
        measured["descent_power_0_averaged_excess_error"]
        < 0.1 * measured["descent_power_0_last_excess_error"]
    )
    assert measured["descent_power_1_last_excess_error"] < 5e-3
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_normal_equations_solve_the_problem(script):
    """Patients' measurements are whitened: their second moments are the identity."""
    inputs, targets = script["least_squares"]()
    assert inputs.shape == (442, 11)
    np.testing.assert_allclose(inputs.T @ inputs / 442, np.eye(11), atol=1e-6)
    config = dataclasses.replace(script["Config"](), epochs=3)
    errors = script["descent_errors"](config, 1.0, False, jax.random.key(1))
    # From zero the excess is what the whole solution explains: about half of the variance.
    assert errors.shape == (3,) and np.all(errors < np.square(inputs.T @ targets / 442).sum())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tail", "2"), "tail=2.0: the variance is finite above 2 only"),
        (("--octaves", "7"), "octaves=7: give at least 8"),
        (("--scale", "0"), "scale=0.0 must be positive"),
        (("--powers", "0.5", "-1"), "powers=(0.5, -1.0): give at least one, none below 0"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
