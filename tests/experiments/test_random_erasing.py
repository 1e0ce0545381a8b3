"""The experiment on random erasing: its occlusions, a run of two steps, and misuse."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAME = "random_erasing.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


def test_occlusions_cover_the_share_that_is_asked_for():
    script = runpy.run_path(str(SCRIPT))
    images = script["jnp"].full((200, 20, 20, 1), 5.0)
    for share in (0.1, 0.5):
        covered = script["occlude"](images, share, script["jax"].random.key(0)) != 5
        np.testing.assert_allclose(np.mean(covered, axis=(1, 2, 3)), share, atol=0.04)
        np.testing.assert_allclose(np.mean(covered), share, atol=0.005)


@pytest.mark.parametrize(
    ("wrong", "holds"),
    [
        (((0, 20), (0, 10), (0, 20)), True),
        (((1, 22), (0, 10), (0, 20)), True),  # one whole picture more, which means nothing
        (((0, 30), (0, 10), (0, 20)), False),  # ten of them
        (((0, 20), (0, 27), (0, 20)), False),  # three occluded pictures fewer mean nothing
        (((0, 5), (0, 18), (0, 20)), False),  # the gain on whole pictures is larger
    ],
)
def test_the_claim_is_about_every_share(wrong, holds):
    """The plain network errs on the first 20, 30 and 60 of a hundred pictures."""
    script = runpy.run_path(str(SCRIPT))

    def errors(spans):
        places = np.arange(100)
        rows = np.stack([(places >= start) & (places < stop) for start, stop in spans])
        return np.stack([rows, rows]).astype(float)  # two seeds

    result = script["conclude"](
        script["Config"](occlusions=(0.1, 0.2)),
        {"erasing": errors(wrong), "plain": errors([(0, 20), (0, 30), (0, 60)])},
    )
    assert result.holds is holds
    assert result.measured["plain_error_occluded_0.1"] == pytest.approx(0.3)
    assert result.measured["gain_occluded_0.2"] == pytest.approx(0.4)
    error = result.measured["gain_occluded_0.2_standard_error"]
    assert error == pytest.approx(np.sqrt(0.4 * 0.6 / 99))


def test_writes_what_it_promises(launch, tmp_path):
    network = ("--depths", 1, "--widths", 8)
    size = ("--steps", 2, "--num-seeds", 1, "--num-draws", 2, "--occlusions", 0.2, 0.4)
    flags = (*network, *size, "--folder", "run")
    _, errors = (process := launch(NAME, *flags, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    measured = result["measured"]
    for name in ("plain", "erasing"):
        for share in ("0", "0.2", "0.4"):
            assert 0 < measured[f"{name}_error_occluded_{share}"] <= 1  # nothing is learnt yet
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--occlusions", "0.2", "1.0"), "occlusions=(0.2, 1.0): give at least one share between"),
        (("--num-seeds", "0"), "num_seeds=0 must be at least 1"),
        (("--area", "0.1", "1.5"), "random_erasing: area=(0.1, 1.5) must be two numbers in order"),
        (("--widths", "8", "16"), "depths=(1, 1, 1) and widths=(8, 16): give one of each"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
