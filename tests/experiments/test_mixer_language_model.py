"""The mixers' language models: equal sizes, and a short run killed by no one."""

import json
import runpy
from pathlib import Path

import pytest

NAME = "mixer_language_model.py"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def test_sizes_are_equal_whatever_the_mixer():
    config = SCRIPT["Config"]()
    target = SCRIPT["count_parameters"](SCRIPT["mixer_decoder"](config, "softmax"))
    # One unit of the feed-forward's width is the finest step there is.
    unit = 3 * config.width * config.depth
    names = SCRIPT["causal_mixers"]()
    assert "softmax" in names and "linformer" not in names
    for name in names:
        count = SCRIPT["count_parameters"](SCRIPT["equal_decoder"](config, name, target))
        assert abs(count - target) <= unit / 2, name


def test_a_mixer_that_is_too_large_is_named():
    with pytest.raises(ValueError, match="softmax alone has more than the 1000 parameters"):
        SCRIPT["equal_decoder"](SCRIPT["Config"](), "softmax", 1000)


def test_the_claim_follows_the_numbers():
    def curve(bits):
        return {"parameters": 1, "step": [1], "seconds": [1.0], "bits": [bits]}

    curves = {"gla": curve(2.0), "gated_delta": curve(1.9), "retention": curve(2.1)}
    assert SCRIPT["conclude"](curves).holds
    assert not SCRIPT["conclude"]({**curves, "gla": curve(2.2)}).holds
    assert not SCRIPT["conclude"]({**curves, "linear": curve(1.8)}).holds
    assert not SCRIPT["conclude"]({"gla": curve(1.0)}).holds


def test_a_short_run_learns_and_writes_what_it_promises(launch, tmp_path):
    size = ("--width", 32, "--depth", 1, "--num-heads", 2, "--head-dim", 16, "--length", 64)
    steps = ("--steps", 30, "--evaluate-every", 10, "--warmup", 3, "--held-out-windows", 8)
    mixers = ("--mixers", "softmax", "linear")
    process = launch(NAME, *mixers, *size, *steps, "--folder", "run", cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    assert abs(measured["softmax_parameters"] - measured["linear_parameters"]) <= 48
    for name in ("softmax", "linear"):
        curve = json.loads((tmp_path / "run" / name / "curve.json").read_text())
        assert curve["step"] == [10, 20, 30]
        assert curve["seconds"] == sorted(curve["seconds"])
        # Eight bits are a byte nothing is known of.
        assert 8 > curve["bits"][0] > curve["bits"][-1] > 1
        assert measured[f"{name}_bits_per_byte"] == curve["bits"][-1]
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000
