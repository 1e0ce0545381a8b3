"""The experiment on random features, in a short configuration and misused."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

NAME = "performer_error.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


def test_writes_what_it_promises(launch, tmp_path):
    flags = (
        *("--features", 16, 64, 256, "--scales", 0.25, "--length", 64),
        *("--num-draws", 120, "--folder", "run"),
    )
    _, errors = (process := launch(NAME, *flags, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    measured = result["measured"]
    assert result["holds"]
    for name in ("orthogonal", "independent"):
        assert abs(measured[f"scale_0.25_positive_{name}_slope"] + 0.5) < 0.1
    assert measured["scale_0.25_positive_orthogonal_over_independent"] < 0.95
    assert measured["scale_0.25_trigonometric_orthogonal_over_independent"] < 0.5
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


def test_the_error_is_relative_to_exact_attention():
    """With values of one direction and features of one key, against torch."""
    script = runpy.run_path(str(SCRIPT))
    config = script["Config"](length=17, width=5, features=(4, 8), num_draws=3)
    key = script["jax"].random.key(0)
    q, k, v = script["draw_inputs"](config, 0.5, key)
    projections = script["draw_projections"](script["gaussian_projection"], key, config)
    found = script["relative_error"](q, k, v, projections, "positive")
    wide = [torch.tensor(np.asarray(x)[0, :, 0], dtype=torch.float64) for x in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(*wide)
    squares = []
    for w in torch.tensor(np.asarray(projections), dtype=torch.float64):
        a, b = (
            torch.exp(x @ w.T - (x**2).sum(-1, keepdim=True) / 2)
            for x in (wide[0] / 5**0.25, wide[1] / 5**0.25)
        )
        weights = a @ b.T
        out = weights @ wide[2] / weights.sum(-1, keepdim=True)
        squares.append(((out - exact) ** 2).mean())
    expected = torch.sqrt(torch.stack(squares).mean() / (exact**2).mean())
    np.testing.assert_allclose(found, float(expected), rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--features", "16"), "features=(16,): give two different numbers"),
        (("--scales", "0.25", "-1"), "scales=(0.25, -1.0): give at least one, above 0"),
        (("--length", "0"), "length=0 must be at least 1"),
        (("--num-draws", "0"), "num_draws=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
