"""The experiment on deformable layers: its measures by hand, a run of two steps, and misuse."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

NAME = "deformable_convolution.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_digits_are_scaled_sheared_and_turned(script):
    """Against SciPy; places beyond the digit are paper."""
    digit = np.random.default_rng(0).uniform(-1, 1, size=(1, 8, 8, 1)).astype(np.float32)
    scale, angle, shear = 1.7, 0.6, 0.4
    found = script["place"](script["jnp"].asarray(digit), 21, scale, angle, shear)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(turn @ np.array([[1, shear], [0, 1]])) / scale
    matrix = matrix[::-1, ::-1]  # SciPy's axes are (y, x)
    expected = scipy.ndimage.affine_transform(
        np.pad(digit[0, :, :, 0] + 1, 1),
        matrix,
        offset=np.array([4.5, 4.5]) - matrix @ np.array([10, 10]),
        output_shape=(21, 21),
        order=1,
    )
    np.testing.assert_allclose(found[0, :, :, 0], expected - 1, atol=1e-5)


def test_networks_are_of_equal_size(script):
    config = script["Config"]()
    counts = [
        script["num_parameters"](config, model)
        for model in (script["Classifier"](config.width, True), script["equal_plain"](config))
    ]
    assert abs(counts[0] - counts[1]) < 0.05 * counts[0]


def test_points_read_by_two_layers(script):
    """Offsets that are the same everywhere only shift; those that spread add up."""
    still = np.zeros((9, 9, 3, 3, 2))
    points = script["points_read"]([still, still], 4, 4)
    values, counts = np.unique(points[:, 0], return_counts=True)
    assert values.tolist() == [4, 6, 8, 10, 12]
    assert counts.tolist() == [9, 18, 27, 18, 9]
    spread = still + script["tap_grid"]()
    shifted = still + np.array([0.5, -2])
    points = script["points_read"]([spread, shifted], 4, 4)
    np.testing.assert_allclose(points.mean(axis=0), [9, 4])
    assert np.unique(points[:, 0]).tolist() == [3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize(
    ("more", "larger", "holds"),
    [(20, (0.5, 0.1), True), (3, (0.5, 0.1), False), (20, (0.5, -0.1), False)],
)
def test_the_claim_is_about_gain_and_spread(script, more, larger, holds):
    """Of a hundred digits; three more could be chance, and every seed's taps must spread."""
    places = np.arange(100)
    right = {
        (kind, seed): (places < 50 + (more if kind == "deformable" else 0)).astype(float)
        for kind in script["KINDS"]
        for seed in (0, 1)
    }
    small = np.array([[1.0, 2.0], [1.0, 2.0]])
    dilations = np.stack([small, small + np.array(larger)[:, None]], axis=1)
    result = script["conclude"](right, dilations, {"deformable": 11, "plain": 12})
    assert result.holds is holds
    assert result.measured["accuracy_plain"] == pytest.approx(0.5)
    assert result.measured["gain"] == pytest.approx(more / 100)
    error = result.measured["gain_standard_error"]
    assert error == pytest.approx(np.sqrt(more / 100 * (1 - more / 100) / 99))
    measured = result.measured["dilation_second_layer_large_digits"]
    assert measured == pytest.approx(2 + np.mean(larger))


def test_writes_what_it_promises(launch, tmp_path):
    flags = (
        *("--canvas", 12, "--width", 2, "--steps", 2, "--warmup", 1, "--batch-size", 4),
        *("--num-views", 1, "--seeds", 3, "--scales", 0.8, 1.4, "--folder", "run"),
    )
    _, errors = (process := launch(NAME, *flags, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    for kind in ("deformable", "plain"):
        assert 0 <= measured[f"accuracy_{kind}"] == measured[f"accuracy_{kind}_seed_3"] < 0.5
    # Two steps hardly move a tap.
    assert abs(measured["dilation_large_over_small"] - 1) < 0.1
    assert abs(measured["dilation_first_layer_small_digits"] - 1) < 0.1
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scales", "3", "1"), "scales=(3.0, 1.0): give a smaller and a larger one"),
        (("--num-views", "0"), "num_views=0 must be at least 1"),
        (("--seeds",), "seeds=(): give at least one"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
