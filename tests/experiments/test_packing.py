"""The packing experiment in a short configuration."""

import json

NAME = "packing.py"


def test_writes_what_it_promises(launch, tmp_path):
    size = ("--width", 32, "--depth", 1, "--num-heads", 2, "--head-dim", 16, "--length", 96)
    counts = ("--steps", 12, "--warmup", 3, "--rounds", 1, "--prompts", 7)
    judged = ("--held-out-documents", 20, "--batch-size", 3)
    process = launch(NAME, *size, *counts, *judged, "--folder", "run", cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    assert measured["documents"] > 10_000
    assert measured["padded_fill"] < 0.95 < 0.99 < measured["packed_fill"] <= 1
    sequences = measured["padded_sequences"] / measured["packed_sequences"]
    assert abs(measured["packed_fill"] / measured["padded_fill"] / sequences - 1) < 1e-9
    assert measured["relative_difference"] < 1e-5
    assert 8 > measured["held_out_bits_after_packed_training"] > 1
    assert 8 > measured["held_out_bits_padded"] > 1
    assert measured["packed_training_tokens_per_s"] > 0
    assert measured["ragged_reading_tokens_per_s"] > 0
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000


def test_a_folder_of_one_file_is_refused(refused, tmp_path):
    (tmp_path / "alone.txt").write_text("one document")
    errors = refused(NAME, "--data", tmp_path / "alone.txt", "--folder", tmp_path / "run")
    assert "read_documents: the" in errors and "add files" in errors
