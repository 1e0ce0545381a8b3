"""The script of gradient checkpointing: what it counts, what it concludes, a small run."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

NAME = "gradient_checkpointing.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def test_growth_and_depth_within_a_memory(script):
    depths, sizes = (4, 16, 64), [20.0, 40.0, 80.0]
    assert script["growth"](depths, sizes) == pytest.approx(0.5)
    assert script["depth_within"](depths, sizes, 56.568) == pytest.approx(32, rel=1e-3)
    assert script["depth_within"](depths, sizes, 500.0) == 64


def test_the_claim_follows_the_numbers(script):
    config, conclude = script["Config"](depths=(4, 16, 64, 256)), script["conclude"]

    def cost(sizes, seconds, planned=(1.0,) * 4):
        return {"bytes": sizes, "seconds": seconds, "planned": list(planned)}

    none = cost([40.0, 160.0, 640.0, 2560.0], [1.0, 4.0, 16.0, 64.0], (0.9, 1.0, 1.0, 1.1))
    root = cost([20.0, 40.0, 80.0, 160.0], [1.3, 5.0, 20.0, 80.0])
    result = conclude(config, {"none": none, "sqrt": root})
    assert result.holds
    assert result.measured["sqrt_deeper_in_equal_memory"] == pytest.approx(16)
    assert result.measured["sqrt_memory_exponent"] == pytest.approx(0.5)
    assert result.measured["sqrt_time_over_none"] == pytest.approx(1.25)
    assert result.measured["sqrt_worst_time_over_none"] == pytest.approx(1.3)
    assert result.measured["planned_over_xla_lowest"] == 0.9
    assert result.measured["planned_over_xla_highest"] == 1.1
    slow = cost(root["bytes"], [1.4, 4.0, 16.0, 64.0])
    assert not conclude(config, {"none": none, "sqrt": slow}).holds
    steep = cost([2.0, 8.0, 32.0, 128.0], root["seconds"])
    assert not conclude(config, {"none": none, "sqrt": steep}).holds
    shallow = dataclasses.replace(config, from_depth=4)
    assert conclude(shallow, {"none": none, "sqrt": root}).measured[
        "sqrt_deeper_in_equal_memory"
    ] == pytest.approx(4)


def test_a_small_run_measures_less_memory_where_more_is_computed_again(script, tmp_path):
    sizes = {"width": 16, "image_size": 16, "batch_size": 8, "rounds": 1}
    config = script["Config"](**sizes, depths=(4, 16), from_depth=4, policies=("none", "sqrt"))
    measured = script["main"](config, tmp_path).measured
    assert measured["sqrt_mb_16"] < 0.25 * measured["none_mb_16"]
    assert measured["none_memory_exponent"] > 0.85 > 0.6 > measured["sqrt_memory_exponent"]
    assert all(measured[f"{p}_seconds_{d}"] > 0 for p in ("none", "sqrt") for d in (4, 16))
    assert 0.8 < measured["planned_over_xla_lowest"] <= measured["planned_over_xla_highest"] < 1.2
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert {*json.loads((tmp_path / "costs.json").read_text())} == {"depths", "costs"}


def test_what_it_cannot_compare_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="must have from_depth=8"):
        script["main"](script["Config"](depths=(4, 16), from_depth=8), tmp_path)
