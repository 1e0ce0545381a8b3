"""The scaling experiment: its arithmetic against known curves, and a short run of it."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

NAME = "attention_scaling.py"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]


def cost(power, factor, lengths=LENGTHS):
    seconds = [factor * n**power for n in lengths]
    return {"length": list(lengths), "seconds": seconds, "bytes": [100 * n for n in lengths]}


def test_exponents_are_those_of_the_curves():
    assert SCRIPT["exponent"](cost(1.7, 3e-7)) == pytest.approx(1.7)
    assert SCRIPT["exponent"](cost(1.7, 3e-7), "bytes") == pytest.approx(1.0)
    assert SCRIPT["exponent"](cost(1.7, 1e-7, LENGTHS[:4])) is None


def test_crossover_is_where_the_curves_meet():
    quadratic = cost(2.0, 1e-8)
    assert SCRIPT["crossover"](cost(1.0, 1e-5), quadratic) == pytest.approx(1000)
    assert SCRIPT["crossover"](cost(1.0, 1e-3), quadratic) is None
    assert SCRIPT["crossover"](cost(1.0, 1e-9), quadratic) == 256
    # The rival was given up earlier: what both were measured on counts.
    assert SCRIPT["crossover"](cost(1.0, 1e-5), cost(2.0, 1e-8, LENGTHS[:2])) is None


def test_the_claim_follows_the_numbers():
    costs = {"softmax": cost(2.0, 1e-8), "flash": cost(1.0, 1e-5), "flash_quad": cost(2.0, 1e-8)}
    costs["gla"] = cost(1.0, 1e-5)
    result = SCRIPT["conclude"](costs)
    assert result.holds
    assert result.measured["flash_quad_over_flash"] == pytest.approx(8.192)
    assert result.measured["gla_crossover"] == pytest.approx(1000)
    assert not SCRIPT["conclude"]({**costs, "gla": cost(1.0, 1e-9)}).holds
    assert not SCRIPT["conclude"]({**costs, "flash": cost(1.0, 1e-4)}).holds
    assert not SCRIPT["conclude"]({"linear": cost(1.0, 1e-5)}).holds


def test_what_takes_too_long_is_measured_once_and_not_tried_on_longer_sequences():
    config = SCRIPT["Config"](lengths=(16, 32, 64), width=8, num_heads=1, head_dim=8)
    measure = SCRIPT["measure"]
    whole = measure(config, "linear")
    assert whole["length"] == [16, 32, 64] and min(whole["seconds"]) > 0
    given_up = measure(dataclasses.replace(config, max_seconds=0.0), "linear")
    assert given_up["length"] == [16] and len(given_up["seconds"]) == 1
    assert given_up["bytes"] == whole["bytes"][:1]


def test_a_short_run_writes_what_it_promises(launch, tmp_path):
    mixers = ("softmax", "linear")
    process = launch(
        *(NAME, "--mixers", *mixers, "--lengths", 64, 128, "--width", 32, "--folder", "run"),
        cwd=tmp_path,
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    for name in mixers:
        assert measured[f"{name}_ms_64"] > 0 and measured[f"{name}_ms_128"] > 0
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())
    # XLA's own figure: more tokens, more memory.
    assert np.all(np.diff([c["bytes"] for c in costs.values()], axis=1) > 0)
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000
    assert "linear_crossover" in output
