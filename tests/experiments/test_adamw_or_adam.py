"""The script on weight decay: its noisy labels, its conclusions, and a grid of four pairs."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

NAME = "adamw_or_adam.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


@pytest.fixture(scope="module")
def small(script):
    """A grid of two by two; the larger decays leave nothing to learn with."""
    return script["Config"](
        learning_rates=(1e-3, 1e-2),
        decays=(0.1, 300.0),
        l2_decays=(1e-4, 1.0),
        steps=40,
        width=24,
        num_seeds=2,
        batch_size=30,
    )


def test_training_labels_are_noisy_and_those_of_the_test_are_not(script):
    clean, noisy = (
        script["problem"](script["Config"](num_examples=1000, label_noise=share))
        for share in (0.0, 0.5)
    )
    for part in (0, 1):
        np.testing.assert_array_equal(clean[part][0], noisy[part][0])
    np.testing.assert_array_equal(clean[1][1], noisy[1][1])
    assert len(noisy[1][1]) == 797
    # A tenth of the labels drawn anew are the right ones.
    assert np.mean(clean[0][1] != noisy[0][1]) == pytest.approx(0.45, abs=0.05)


def test_tuning_in_turn_costs_nothing_only_where_rate_and_decay_are_apart(script):
    rate, decay = np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij")
    apart = 3.0 + rate**2 + decay**2
    np.testing.assert_array_equal(script["one_after_the_other"](apart), 0.0)
    together = 3.0 + 10 * (rate + decay) ** 2 + rate**2
    np.testing.assert_array_equal(script["one_after_the_other"](together), [1.0, 0.0, 1.0])
    powers = [1.0, 2.0, 4.0]
    assert script["slope"](powers, powers, apart) == pytest.approx(0.0, abs=1e-12)
    assert script["slope"](powers, powers, together) == pytest.approx(-1.0)
    assert script["slope"](powers, [1.0, 4.0, 16.0], together) == pytest.approx(-2.0)


def test_the_claim_follows_the_numbers(script, small):
    """A hundred pictures; errors of 10 and 20 % are five standard errors apart, 10 and 12 not."""

    def grid(*shares):
        places = np.arange(100)
        return np.array([[places < 100 * s for s in row] for row in shares], float)

    def conclude(adamw, adam_l2):
        return script["conclude"](small, {"adamw": grid(*adamw), "adam_l2": grid(*adam_l2)})

    apart, together = ((0.1, 0.3), (0.2, 0.4)), ((0.2, 0.5), (0.4, 0.3))
    result = conclude(apart, together)
    assert result.holds and result.measured["better_error"] and result.measured["cheaper_to_tune"]
    assert result.measured["adamw_best_error"] == pytest.approx(0.1)
    assert result.measured["adamw_best_decay"] == 0.1
    assert result.measured["adam_l2_best_learning_rate"] == 1e-3
    assert result.measured["adam_l2_worst_cost_of_tuning_in_turn"] == pytest.approx(0.1)
    assert result.measured["gain"] == pytest.approx(0.1)
    assert result.measured["gain_standard_error"] == pytest.approx(np.sqrt(0.1 * 0.9 / 99))
    assert not conclude(apart, ((0.12, 0.5), (0.4, 0.3))).holds
    assert not conclude(together, ((0.4, 0.5), (0.6, 0.7))).holds


def test_a_small_grid_is_measured_and_drawn(script, small, tmp_path, capsys):
    """In this process, whose compiler does not optimise: there are eight pairs to compile."""
    measured = script["main"](small, tmp_path).measured
    for name, decay in (("adamw", 0.1), ("adam_l2", 1e-4)):
        assert 0.05 < measured[f"{name}_best_error"] < 0.6
        assert measured[f"{name}_best_decay"] == decay
    rows = [line for line in capsys.readouterr().out.splitlines() if ": learning rate" in line]
    assert len(rows) == 4 and rows[0].startswith("adamw: learning rate 0.001")
    # Where weights shrink to nothing all digits are taken for one, which is right for a tenth.
    assert all(float(row.split()[-1].rstrip("%")) > 85 for row in rows[:2])
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decays": (1.0,)}, r"decays=\(1.0,\): give two or more positive numbers in rising"),
        ({"learning_rates": (1e-2, 1e-3)}, r"learning_rates=\(0.01, 0.001\): give two"),
        ({"label_noise": 1.0}, r"label_noise=1.0 must lie in \[0, 1\)"),
        ({"steps": 0}, r"steps=0 must be at least 1"),
        ({"num_examples": 1797}, r"num_examples=1797 leaves no test; there are 1797 digits"),
    ],
)
def test_bad_input(script, small, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        script["main"](dataclasses.replace(small, **change), tmp_path)
