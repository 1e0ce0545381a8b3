"""The experiment on recall: its task by definition, a run of two steps, and misuse."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAME = "associative_recall.py"
SCRIPT = Path(__file__).parents[2] / "experiments" / NAME


def test_the_answer_is_what_a_dictionary_holds():
    script = runpy.run_path(str(SCRIPT))
    sizes = {"num_writes": 11, "num_live": 5, "num_questions": 7, "num_keys": 13, "num_values": 3}
    config = script["Config"](**sizes)
    batch = script["Recall"](config).batch(np.arange(200), np.random.default_rng(0))
    assert batch["tokens"].shape == (200, 2 * 11 + 7)
    for tokens, answers, rewritten in zip(*batch.values(), strict=True):
        pairs, questions = tokens[:22].reshape(11, 2), tokens[22:]
        memory, writes = {}, {}
        for key, value in pairs.tolist():
            assert 0 <= key < 13 <= value < 13 + 3
            memory[key] = value - 13
            writes[key] = writes.get(key, 0) + 1
        assert len(memory) <= 5
        assert [memory[key] for key in questions.tolist()] == answers.tolist()
        assert [writes[key] > 1 for key in questions.tolist()] == rewritten.tolist()
    # All keys and values occur, both kinds of question do, and old values are not the answer.
    assert set(np.unique(batch["tokens"])) == set(range(16))
    assert 0.05 < np.mean(~batch["rewritten"]) < 0.5


def test_writes_what_it_promises(launch, tmp_path):
    # Short sequences compile in a fraction of the time.
    task = ("--num-writes", 3, "--num-live", 2, "--num-questions", 2, "--num-tests", 64)
    flags = (*task, "--steps", 2, "--warmup", 1, "--head-dims", 4, "--width", 8, "--folder", "run")
    _, errors = (process := launch(NAME, *flags, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    measured = result["measured"]
    assert not result["holds"]  # nothing is learnt in two steps
    assert measured["chance"] == 1 / 16
    for memory in ("linear_32", "gla_32", "delta_32", "gated_delta_32", "softmax_all"):
        for kind in ("once", "again"):
            assert 0 <= measured[f"{memory}_floats_{kind}"] < 0.5
    with Image.open(tmp_path / "run" / "figure.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-live", "12"), "num_live=12 must be at least 1 and below num_writes=12"),
        (("--num-keys", "5"), "num_keys=5 must be at least num_live=6"),
        (("--num-questions", "0"), "num_questions=0 must be at least 1"),
        (("--head-dims", "4", "3"), "head_dims=(4, 3): give at least one, all even and above 0"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
