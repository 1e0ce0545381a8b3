"""The script on predicting several tokens: sizes, memory, a short run and misuse."""

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


def test_the_claim_follows_the_numbers():
    def holds(**changed):
        bits = {**BITS, **{name.replace("_", " "): value for name, value in changed.items()}}
        return SCRIPT["conclude"](SCRIPT["Config"](), bits, {}, {}, {}).holds

    assert holds(equal_steps=1.9) and not holds(equal_steps=2.1) and not holds(equal_time=1.0)


def test_a_short_run_measures_what_it_promises(tmp_path):
    """In this process, since its seven programs compile faster here."""
    size = {"width": 16, "depth": 3, "heads": 2, "num_heads": 1, "head_dim": 16, "length": 32}
    config = SCRIPT["Config"](**size, steps=6, held_out_windows=8)
    measured = SCRIPT["main"](config, tmp_path).measured
    for name in BITS:
        assert 4 < measured[f"bits per byte, {name}"] < 8.5
        assert measured[f"seconds of training, {name}"] > 0
    assert measured["steps, equal steps"] == measured["steps, equal size"] == 6
    assert 1 <= measured["steps, equal time"] <= 6
    turns = ("next token", "heads in turn", "heads at once")
    memory = [measured[f"MB for gradients, {name}"] for name in turns]
    assert memory == sorted(set(memory))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("heads", [1, 5])
def test_bad_input_is_one_message(heads, refused):
    message = refused(NAME, "--heads", heads)
    assert f"heads={heads} must be at least 2 and below depth=5" in message
