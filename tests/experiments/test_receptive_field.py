"""The experiment on receptive fields, in a short configuration and misused."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAME = "receptive_field.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


def test_writes_what_it_promises(launch, tmp_path):
    flags = ("--depth", 3, "--depths", 2, 8, "--features", 8, "--images", 4, "--folder", "run")
    _, errors = (process := launch(NAME, *flags, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    measured = result["measured"]
    assert result["holds"]
    assert measured["plain: side by arithmetic"] == 7
    assert measured["hybrid 1, 2, 3: side by arithmetic"] == 13
    assert measured["dilated by 2: share seen"] == pytest.approx(49 / 169)
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


def test_radius_is_that_of_a_known_field():
    script = runpy.run_path(str(SCRIPT))
    field = np.zeros((9, 9))
    field[4, 1] = field[4, 7] = field[2, 4] = field[6, 4] = 2.0
    assert script["radius"](field) == pytest.approx(np.sqrt((9 + 9 + 4 + 4) / 4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--depths", "4"), "depths=(4,): give two different numbers"),
        (("--images", "0"), "images=0 must be at least 1"),
        (("--shift", "0"), "shift=0.0 must be above 0"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
