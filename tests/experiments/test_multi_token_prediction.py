"""The script on predicting several tokens: sizes, memory, a short run and misuse."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

NAME = "multi_token_prediction.py"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))
BITS = {name: 2.0 for name in ("next token", "equal steps", "equal time", "equal size")}


def test_equal_sizes_are_equal():
    def parameters(heads, depth):
        model = SCRIPT["decoder"](SCRIPT["Config"](), heads=heads, depth=depth)
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        return sum(leaf.size for leaf in jax.tree.leaves(variables))

    assert parameters(1, 5) == parameters(4, 2) < parameters(4, 5)


def test_heads_in_turn_take_less_memory_than_at_once():
    config = SCRIPT["Config"](width=16, num_heads=1, head_dim=16, length=64, batch_size=2)
    memory = SCRIPT["gradient_megabytes"](config)
    assert memory["next token"] < memory["heads in turn"] < memory["heads at once"]


def test_the_claim_follows_the_numbers():
    def holds(**changed):
        bits = {**BITS, **{name.replace("_", " "): value for name, value in changed.items()}}
        return SCRIPT["conclude"](SCRIPT["Config"](), bits, {}, {}, {}).holds

    assert holds(equal_steps=1.9) and not holds(equal_steps=2.1) and not holds(equal_time=1.0)


def test_a_short_run_writes_what_it_promises(launch, tmp_path):
    size = ("--width", 16, "--depth", 3, "--heads", 2, "--num-heads", 1, "--head-dim", 16)
    rest = ("--length", 32, "--steps", 6, "--held-out-windows", 8, "--folder", "run")
    _, errors = (process := launch(NAME, *size, *rest, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    for name in BITS:
        assert 4 < measured[f"bits per byte, {name}"] < 8
        assert measured[f"seconds of training, {name}"] > 0
    assert measured["steps, equal steps"] == measured["steps, equal size"] == 6
    assert 1 <= measured["steps, equal time"] <= 6
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("heads", [1, 5])
def test_bad_input_is_one_message(heads, refused):
    message = refused(NAME, "--heads", heads)
    assert f"heads={heads} must be at least 2 and below depth=5" in message
