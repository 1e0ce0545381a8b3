"""The experts' script: equal active parameters, what it counts, and a run of few steps."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

NAME = "mixture_of_experts.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def test_a_token_sees_equally_many_parameters_in_every_model(script):
    config = script["Config"](depth=1)
    tokens = jnp.zeros((1, 2), jnp.int32)

    def seen(model):
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        mlp = dict(shapes["block_0"]["mlp"])
        mlp.pop("router", None)
        share = config.top_k / config.num_experts
        count = {name: sum(leaf.size for leaf in jax.tree.leaves(x)) for name, x in mlp.items()}
        if "shared" in count:
            return count.pop("shared") + share * sum(count.values())
        return sum(count.values())

    models = script["models"](config)
    assert [*models] == ["dense", "unbalanced", "loss", "bias"]
    assert len({seen(model) for model in models.values()}) == 1
    fields = {name: model.feed_forward() for name, model in models.items() if name != "dense"}
    assert [f.bias_rate for f in fields.values()] == [None, None, config.bias_rate]
    assert [bool(f.balance_coefficient) for f in fields.values()] == [False, True, False]


def test_imbalance_is_that_of_the_worst_layer(script):
    """Two batches that are uneven in opposite ways are even together."""
    loads = np.array([[[3, 1, 2], [2, 2, 2]], [[1, 3, 2], [4, 1, 1]]])
    overall, of_batch = script["imbalance"](loads)
    assert overall == pytest.approx(6 / 4)
    assert of_batch == pytest.approx((3 / 2 + 4 / 2) / 2)


def test_the_claim_follows_the_numbers(script):
    config, conclude = script["Config"](), script["conclude"]

    def figures(bits, *loads):
        extra = {"loads": np.array([[loads]])} if loads else {}
        return {"bits": bits, "seconds": 1.0, "steps": 1, "parameters": 1, **extra}

    found = {
        "dense": figures(2.1),
        "unbalanced": figures(2.0, 9, 1),
        "loss": figures(2.01, 6, 5),
        "bias": figures(2.005, 6, 5),
        "dense in equal time": figures(1.9),
    }
    result = conclude(config, found)
    assert result.holds
    assert result.measured["bias_max_over_mean_load"] == pytest.approx(12 / 11)
    assert result.measured["experts_beat_dense_in_equal_steps"]
    assert not result.measured["experts_beat_dense_in_equal_time"]
    assert not conclude(config, {**found, "bias": figures(2.005, 7, 4)}).holds
    assert not conclude(config, {**found, "bias": figures(2.02, 6, 5)}).holds
    lenient = dataclasses.replace(config, tolerance=0.05)
    assert conclude(lenient, {**found, "bias": figures(2.02, 6, 5)}).holds


def test_a_short_run_measures_what_it_promises(script, tmp_path):
    """In this process, whose compiler does not optimise: there are four models to compile."""
    size = {"width": 16, "depth": 1, "num_heads": 2, "expert_width": 8, "length": 32}
    experts = {"num_experts": 5, "top_k": 2, "held_out_windows": 9, "batch_size": 4}
    config = script["Config"](**size, **experts, steps=3, warmup=1)
    measured = script["main"](config, tmp_path).measured
    for name in ("dense", "unbalanced", "loss", "bias", "dense_in_equal_time"):
        assert 0 < measured[f"{name}_bits_per_byte"] < 10
        assert measured[f"{name}_seconds"] > 0
    assert measured["bias_parameters"] > measured["dense_parameters"]
    assert 1 <= measured["loss_max_over_mean_load"] <= 2.5
    assert measured["loss_max_over_mean_load_of_a_batch"] >= measured["loss_max_over_mean_load"]
    assert measured["dense_in_equal_time_steps"] >= 1
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000
