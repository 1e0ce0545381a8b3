"""The experiment on smooth scores: its sets, its losses, its verdict, and a short run."""

import json
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
import torch
from sklearn.linear_model import LogisticRegression

NAME = "soft_metrics.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def test_losses_and_scores_are_torchs_and_scikit_learns(script):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=31), (rng.random(31) < 0.2).astype(float)
    arrays = jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32)
    wide = torch.tensor(logits), torch.tensor(targets)
    share = targets.mean()
    weight = torch.tensor(np.where(targets > 0, 0.5 / share, 0.5 / (1 - share)))
    losses, entropy = script["LOSSES"], torch.nn.functional.binary_cross_entropy_with_logits
    np.testing.assert_allclose(losses["cross-entropy"](*arrays), entropy(*wide), rtol=1e-5)
    weighted = losses["weighted cross-entropy"](*arrays)
    np.testing.assert_allclose(weighted, entropy(*wide, weight=weight), rtol=1e-5)
    for threshold in (-0.5, 0.0):
        want = sklearn.metrics.f1_score(targets, logits > threshold)
        np.testing.assert_allclose(script["exact_f1"](*arrays, threshold), want, rtol=1e-6)
        sharp = losses["soft F1"](100000 * (arrays[0] - threshold), arrays[1])
        np.testing.assert_allclose(1 - sharp, want, atol=1e-5)


def test_training_and_test_sets_share_no_picture(script):
    config = script["Config"](splits=2)
    (inputs, targets), (test_inputs, test_targets) = script["halves"](config, 1, 5)
    assert inputs.shape == test_inputs.shape and inputs.shape[0] == 20
    assert np.all(targets.sum(axis=1) == 5) and np.all(test_targets.sum(axis=1) == 5)
    for one, other in zip(inputs, test_inputs, strict=True):
        here, there = ({row.tobytes() for row in rows} for rows in (one, other))
        assert len(here & there) <= 1  # two of the 1,797 pictures may be equal
    assert not np.array_equal(inputs[0], inputs[1])


def test_the_verdict_follows_the_scores(script):
    config, conclude = script["Config"](positives=(9, 4)), script["conclude"]
    noise = np.linspace(-0.01, 0.01, 4)[None]

    def scores(soft):
        plain = np.full((10, 4), 0.5)
        return {
            "cross-entropy": plain,
            "soft F1": plain + soft + noise,
            script["CHOSEN"]: plain + 0.3,
        }

    cold = {"rank": [0.001, 1.0]}
    result = conclude(config, {2: {8: scores(0.0)}, 4: {9: scores(0.0), 4: scores(0.2)}}, cold)
    assert result.holds and result.measured["shrink_4_positives_4_gain"] == pytest.approx(0.2)
    error = result.measured["shrink_4_positives_4_gain_standard_error"]
    assert error == pytest.approx(np.std(noise, ddof=1) / np.sqrt(40))
    assert result.measured["shrink_4_positives_4_gain_over_a_chosen_threshold"] == pytest.approx(
        -0.1
    )
    assert not conclude(
        config, {2: {4: scores(1.0)}, 4: {9: scores(0.2), 4: scores(error)}}, cold
    ).holds
    assert not conclude(config, {4: {4: scores(0.2)}}, {"rank": [0.02, 1.0]}).holds


def test_a_short_run_measures_what_it_promises(script, tmp_path):
    config = script["Config"](positives=(70,), shrink=(4,), splits=2)
    result = script["main"](config, tmp_path)
    measured = result.measured
    # Where pictures are of 2 x 2, cross-entropy hardly ever says yes.
    assert result.holds and measured["shrink_4_positives_70_gain"] > 0.1
    assert abs(measured["shrink_4_positives_70_gain_over_a_chosen_threshold"]) < 0.05
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    # Training has come to its end: cross-entropy is scikit-learn's logistic regression.
    (inputs, targets), (test_inputs, test_targets) = script["halves"](config, 4, 70)
    theirs = [
        sklearn.metrics.f1_score(
            tested, LogisticRegression(C=1e4, max_iter=2000).fit(x, y).predict(seen)
        )
        for x, y, seen, tested in zip(inputs, targets, test_inputs, test_targets, strict=True)
    ]
    found = measured["shrink_4_positives_70_cross_entropy"]
    assert found == pytest.approx(np.mean(theirs), abs=0.01)


def test_a_hidden_layer_learns_more(script):
    """Where a digit is no half-space of the others: in training, the eights."""
    config = script["Config"](splits=2, hidden=8, steps=300)
    (inputs, targets), _ = script["halves"](config, 1, 60)
    sets = [array[16:18] for array in (inputs, targets)]
    keys = script["jax"].random.split(script["jax"].random.key(0), 2)
    score = script["train_and_score"]
    _, deep = score(config, script["cross_entropy"], keys, *sets, *sets)
    flat = script["Config"](splits=2, steps=300)
    _, linear = score(flat, script["cross_entropy"], keys, *sets, *sets)
    assert np.all(np.asarray(deep) > np.asarray(linear) + 0.03)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--positives", "8", "81"), "positives=(8, 81): give numbers of 1 to 80"),
        (("--shrink", "3"), "shrink=(3,): choose among 1, 2, 4 and 8"),
        (("--splits", "1"), "splits=1, steps=1500: give at least 2 splits and 1 step"),
        (("--hidden", "-1"), "hidden=-1 must not be negative"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
