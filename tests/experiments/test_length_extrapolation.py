"""Train short, test long: its data and conclusions, and a short run."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxmodels import data

NAME = "length_extrapolation.py"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))
Config, NotedText, Reading = (SCRIPT[name] for name in ("Config", "NotedText", "Reading"))


@pytest.mark.parametrize("gaps", [None, (64, 80, 128, 224)])
def test_every_question_is_answered_by_the_note_before_it(gaps):
    text = np.random.default_rng(0).integers(0, 256, 5_000).astype(np.uint8)
    batch = NotedText(data.ByteWindows(text, 256), gaps).batch(
        np.arange(7), np.random.default_rng(1)
    )
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        (asked,) = np.nonzero((tokens >= 1) & (tokens <= 8))
        assert len(asked) == (16 if gaps is None else 8)
        for place in asked:
            colour, answer = tokens[place] - 1, targets[place]
            assert 128 + 16 * colour <= answer < 128 + 16 * (colour + 1)
            of_colour = (tokens >= 128 + 16 * colour) & (tokens < 144 + 16 * colour)
            (noted,) = np.nonzero(of_colour[:place])
            assert (tokens[noted] == answer).all() and len(noted)
            if gaps is not None:
                assert (place - noted).tolist() == [gaps[colour % 4]]


def test_methods_are_plain_rotary_within_the_trained_length():
    """So that all lines of the figure begin at one point."""
    config = Config(depth=2)
    ntk, yarn = (SCRIPT["layers"](config, name, 256)[0]["position"] for name in ("ntk", "yarn"))
    assert ntk.scaling.factor == yarn.scaling.factor == 1
    assert SCRIPT["layers"](config, "leaky_rerope", 256)[0]["position"].leak == 1
    far = SCRIPT["layers"](config, "leaky_rerope", 4096)[0]["position"]
    # The last distance lands just on the trained length.
    assert far.window + (4096 - far.window) / far.leak == 256
    windows = [layer["window"] for layer in SCRIPT["layers"](config, "hwfa", 4096)]
    assert windows == [192, None]
    assert SCRIPT["layers"](config, "window", 4096)[1]["window"] == 255


def test_the_claim_follows_the_numbers():
    config = Config()

    def readings(**changes):
        values = {"rope": (9.0, 0.1), "ntk": (2.1, 0.9), "rerope": (2.1, 0.9), "window": (2.0, 0.0)}
        values.update(changes)
        out = {}
        for name, (bits, recall) in values.items():
            curve = np.r_[np.full(4, 2.0), np.full(60, bits)]
            out[name] = [Reading(curve, {64: 1.0, 1024: recall, 2048: recall})]
        return out

    assert SCRIPT["conclude"](config, readings()).holds
    for name, value in (
        ("rope", (2.4, 0.1)),
        ("ntk", (6.0, 0.9)),
        ("rerope", (2.8, 0.9)),
        ("rerope", (2.1, 0.1)),
        ("window", (2.0, 0.9)),
    ):
        assert not SCRIPT["conclude"](config, readings(**{name: value})).holds, name


def test_bad_configurations():
    for message, options in (
        (r"trained=\['alib'\] is unknown", {"trained": ("alib",)}),
        (r"methods=\['rope'\] is unknown", {"methods": ("rope",)}),
        ("length=128 must be at least 256", {"length": 128}),
        (r"lengths=\(256, 300\) multiples of 64", {"lengths": (256, 300)}),
        (r"lengths=\(512, 256\) must rise", {"lengths": (512, 256)}),
    ):
        with pytest.raises(ValueError, match=message):
            SCRIPT["check"](Config(**options))


def test_a_short_run_learns_and_writes_what_it_promises(launch, tmp_path):
    size = ("--width", 32, "--depth", 1, "--num-heads", 2, "--head-dim", 16, "--batch-size", 8)
    short = ("--steps", 10, "--warmup", 3, "--lengths", 512, "--held-out-bytes", 2048)
    process = launch(
        NAME,
        *size,
        *short,
        "--methods",
        "yarn",
        "--trained",
        "alibi",
        "learned",
        "--folder",
        "run",
        cwd=tmp_path,
    )
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    # Eight bits are a byte nothing is known of.
    for name in ("rope", "ntk", "rerope", "window", "yarn", "alibi", "learned"):
        assert 1 < measured[f"{name}_bits_beyond"] < 20
        assert 0 <= measured[f"{name}_recall_beyond"] <= 1
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000
