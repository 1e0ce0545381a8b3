"""The script on precision: what it counts, what it concludes, and a run of few steps."""

import dataclasses
import json
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

NAME = "mixed_precision.py"
KEYS = ("float32", "bfloat16", "float16", "float16_unscaled", "float8")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


class Squares(nn.Module):
    """Ten logits from a weight and its square, which needs the weight for its gradient."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1).astype(self.dtype)
        weight = self.param("weight", nn.initializers.ones, (64, 10)).astype(self.dtype)
        return jnp.exp(x @ weight)


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.float16, 2)])
def test_kept_bytes_are_those_of_the_activations(script, dtype, size):
    """The pictures, the exponential, and the softmax of the loss, which is float32 always."""
    model, batch = Squares(dtype), script["first_batch"](script["Config"](batch_size=7))
    params = jax.jit(model.init)(jax.random.key(0), batch["image"])["params"]
    kept = script["kept_bytes"](model, "float16", params, batch)
    activations = size * 7 * (64 + 10)
    # Softmax keeps no more than its logits, their exponentials, and a few numbers a row.
    assert activations + 4 * 7 * 10 <= kept <= activations + 4 * 7 * (2 * 10 + 4)


def test_float8_keeps_a_byte_of_what_enters_a_product(script):
    config = script["Config"](width=16, depth=1, num_heads=2, batch_size=5)
    batch = script["first_batch"](config)
    model = script["build"](config, "float8")
    params = jax.jit(model.init)(jax.random.key(0), batch["image"])["params"]
    high, low = (
        script["kept_bytes"](model, name, params, batch) for name in ("bfloat16", "float8")
    )
    # Of 16 tokens an image: what enters q, k and v, the output, and both maps of the feed-forward.
    assert 0.4 < (high - low) / (5 * 16 * (16 + 16 + 16 + 64)) < 1


def test_lost_elements_are_zeros_where_float32_has_none(script):
    gradients = {
        "float32": np.array([0.0, 1e-9, 1e-3, -1e-8]),
        "float16": np.array([0.0, 1e-9, 1e-3, 0.0]),
    }
    assert script["lost"](gradients, "float16") == pytest.approx(1 / 3)
    assert script["lost"](gradients, "float32") == 0.0


def test_the_typical_error_is_that_of_the_median_element(script):
    exact = np.array([0.0, 1e-9, 2.0, -4.0])
    gradients = {"float32": exact, "float16": np.array([5.0, 0.0, 2.02, -4.0])}
    assert script["typical_error"](gradients, "float16") == pytest.approx(0.01)


def test_the_claim_follows_the_numbers(script):
    config = script["Config"](error_tolerance=0.01)
    figures = {"error": 0.03, "kept_bytes": 90, "temporary_bytes": 100, "step_seconds": 1.0}
    names = list(script["RUNS"])
    found = {name: dict(figures) for name in names}
    found["float16"] |= {"kept_bytes": 54, "step_seconds": 0.5}
    found["float8"]["kept_bytes"] = 40
    exact = np.ones(100)
    gradients = {name: exact for name in names}
    gradients["float16 unscaled"] = np.where(np.arange(100) < 20, 0.0, 1.0)
    gradients["float16"] = np.where(np.arange(100) < 1, 0.0, 1.0)

    def conclude(**change):
        return script["conclude"](config, {**found, **change}, gradients)

    result = conclude()
    assert result.holds
    assert result.measured["float16_gradient_lost"] == pytest.approx(0.01)
    assert result.measured["float16_unscaled_gradient_lost"] == pytest.approx(0.2)
    assert result.measured["float16_kept_bytes_over_float32"] == pytest.approx(0.6)
    assert result.measured["float16_step_seconds_over_float32"] == 0.5
    assert not conclude(bfloat16={**figures, "error": 0.045}).holds
    assert not conclude(float16={**found["float16"], "error": 0.015}).holds
    assert not conclude(float16={**found["float16"], "kept_bytes": 70}).holds
    assert not conclude(float8={**found["float8"], "error": 0.045}).holds
    assert not conclude(float8={**found["float8"], "kept_bytes": 55}).holds
    # That the unscaled run goes wrong is no part of the claim.
    assert conclude(**{"float16 unscaled": {**figures, "error": 0.9}}).holds
    gradients["float16"] = np.where(np.arange(100) < 3, 0.0, 1.0)
    assert not conclude().holds


def test_a_short_run_measures_every_policy(script, tmp_path):
    """In this process, whose compiler does not optimise: there are four steps to compile."""
    size = {"width": 8, "depth": 1, "num_heads": 2, "batch_size": 6}
    config = script["Config"](**size, steps=4, warmup=1, turns=1, growth_interval=3, log_every=1)
    measured = script["main"](config, tmp_path).measured
    for name in KEYS:
        assert measured[f"{name}_loss"] == pytest.approx(measured["float32_loss"], rel=0.02)
        assert 0.5 < measured[f"{name}_error"] <= 1
    assert measured["bfloat16_kept_bytes"] == measured["float16_kept_bytes"]
    assert 0.4 < measured["float16_kept_bytes_over_float32"] < 0.8
    assert measured["float32_step_seconds"] > 0
    assert measured["float16_temporary_bytes"] > 0
    assert (measured["float16_skipped"], measured["float16_unscaled_skipped"]) == (0, 0)
    # It doubles after three finite steps of four.
    assert (measured["float16_last_scale"], measured["float16_unscaled_last_scale"]) == (2**16, 1)
    assert measured["float32_gradient_lost"] == 0
    # The gradient of the keys' 8 biases is rounding error alone, some of which may cancel.
    assert measured["float16_gradient_lost"] <= 8 / 1100
    assert json.loads(json.dumps(measured)) == measured
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"error_tolerance": -0.1}, "error_tolerance=-0.1 must not be negative"),
    ],
)
def test_bad_input(script, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        script["main"](dataclasses.replace(script["Config"](), **change), tmp_path)
