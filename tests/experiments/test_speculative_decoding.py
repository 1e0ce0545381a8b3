"""Drafts on real text: a short run of everything, the conclusions, and bad input."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

NAME = "speculative_decoding.py"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))


def runs(texts, seconds, rounds):
    return SCRIPT["Runs"](texts, seconds, np.array(rounds))


def found(**changes):
    """What nine ways might have measured, with which all claims hold."""
    texts, drawn = [[1, 2, 3, 4]], [[4, 4]]
    ways = {
        "plain": runs(texts, 8.0, 0),
        "draft model": runs(texts, 4.0, [1, 0, 9]),
        "n-gram": runs(texts, 5.0, [5, 5]),
        "multi-token": runs(texts, 4.0, [1, 9]),
        "medusa": runs(texts, 4.0, [1, 9]),
        "plain, drawn": runs(drawn, 8.0, 0),
        "draft model, drawn": runs(drawn, 5.0, [5, 5]),
        "medusa, drawn": runs(drawn, 4.0, [5, 5]),
        "medusa, typical": runs(drawn, 2.0, [5, 5]),
    }
    return ways | changes


def test_numbers_are_what_was_counted():
    measured = SCRIPT["summarise"](found())
    assert measured["plain: tokens/s"] == 0.5
    assert measured["draft model: times plain"] == 2
    assert measured["draft model: tokens a round"] == pytest.approx(2.8)
    assert measured["draft model: first guess accepted"] == pytest.approx(0.9)
    # Drawn text is compared with drawn text.
    assert measured["medusa, typical: times plain"] == 4
    assert (
        measured["medusa: texts identical"] == "1 of 1" and measured["all greedy texts identical"]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"draft model": runs([[1, 2, 3, 4]], 4.1, [1, 9])},
        {"medusa": runs([[1, 2, 3, 5]], 4.0, [1, 9])},
        {"medusa, typical": runs([[4, 4]], 4.0, [5, 5])},
        {"multi-token": runs([[1, 2, 3, 4]], 4.0, [2, 8])},
    ],
)
def test_the_claim_follows_the_numbers(change):
    def holds(found):
        return SCRIPT["conclude"](SCRIPT["summarise"](found)).holds

    assert holds(found())
    assert not holds(found(**change))


def test_a_short_run_writes_what_it_promises(launch, tmp_path):
    size = ("--width", 32, "--depth", 2, "--heads", 3, "--draft-width", 32, "--draft-depth", 1)
    steps = ("--length", 64, "--steps", 12, "--draft-steps", 12, "--medusa-steps", 6)
    text = ("--prompts", 2, "--prompt-length", 16, "--new-tokens", 12, "--tree-size", 7)
    process = launch(NAME, *size, *steps, *text, "--folder", "run", cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    assert measured["all greedy texts identical"]
    assert 8.5 > measured["bits_per_byte"] > 1 and len(measured["tree"].split()) == 7
    for way in SCRIPT["GREEDY"] + SCRIPT["DRAWN"]:
        assert measured[f"{way}: tokens/s"] > 0 and measured[f"{way}: tokens a round"] >= 1
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "steps=0 must be at least 1"),
        (("--prompt-length", "65"), "prompt_length=65 must be positive, and with new_tokens=192"),
        (("--heads", "1"), "heads=1 must be at least 2 and temperature=0.7 above 0"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
