"""The comparison of meshes: a run on one and two devices, and what it concludes."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

NAME = "data_parallel.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def figures(state, sent, losses=(3.0, 2.0)):
    return {
        "parameters": 100,
        "state": state,
        "working": 50,
        "sent": {"all-reduce": sent},
        "tokens_per_second": 10.0,
        "losses": list(losses),
    }


def test_the_claim_follows_the_numbers(script):
    config, conclude = script["Config"](devices=(1, 4)), script["conclude"]
    found = {
        "data": {1: figures(300, 0), 4: figures(300, 150)},
        "fsdp": {1: figures(300, 0), 4: figures(78, 225, losses=(3.0, 2.25))},
    }
    result = conclude(config, found)
    assert result.holds
    assert result.measured["fsdp_state_share_of_a_device"] == pytest.approx(0.26)
    assert result.measured["fsdp_sent_over_data"] == pytest.approx(1.5)
    assert result.measured["fsdp_largest_difference_of_loss"] == 0.25
    heavy = {**found, "fsdp": {1: figures(300, 0), 4: figures(84, 225)}}
    assert not conclude(config, heavy).holds
    talkative = {**found, "fsdp": {1: figures(300, 0), 4: figures(75, 240)}}
    assert not conclude(config, talkative).holds
    assert not conclude(config, {"data": found["data"]}).holds


def test_unknown_strategies_are_refused(script):
    with pytest.raises(ValueError, match="strategy 'pipeline' is unknown; choose from data, fsdp"):
        script["case"](script["Config"](), "pipeline", 2)


def test_two_devices_share_the_state_and_have_the_losses_of_one(script, tmp_path):
    """In processes of their own, one for each number of devices."""
    sizes = {"width": 32, "depth": 1, "num_heads": 2, "mlp_width": 48, "vocab_size": 64}
    config = script["Config"](
        devices=(1, 2), strategies=("data", "fsdp"), length=16, batch_size=4, steps=1, **sizes
    )
    result = script["main"](config, tmp_path)
    measured = result.measured
    assert measured["data_state_share_of_a_device"] == 1
    assert 0.5 <= measured["fsdp_state_share_of_a_device"] < 0.56
    # Gradients once there and back, and little else: norms and sums.
    assert 1 <= measured["data_sent_over_parameters"] < 1.1
    assert 1.4 < measured["fsdp_sent_over_data"] < 1.6
    for name in config.strategies:
        assert measured[f"{name}_largest_difference_of_loss"] < 1e-5
        assert measured[f"{name}_speed_over_one_device"] > 0
    assert set(measured["fsdp_sent_by_kind"]) >= {"all-gather"}
    assert dataclasses.asdict(result) == json.loads(json.dumps(dataclasses.asdict(result)))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
