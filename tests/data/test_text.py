"""The standard library as text, against its own files and modules."""

import inspect
import json.decoder
import pydoc_data.topics
import string
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.data import ByteWindows, batches, python_text


def test_whole_files_are_in_one_part_each():
    parts = {name: python_text(name).tobytes().split(b"\0") for name in ("train", "test")}
    for module in (json.decoder, string, inspect):
        source = Path(module.__file__).read_bytes()
        assert [source in files for files in parts.values()].count(True) == 1
    topics = [text.encode() for text in pydoc_data.topics.topics.values()]
    found = {name: sum(topic in {*files} for topic in topics) for name, files in parts.items()}
    assert sum(found.values()) == len(topics) and min(found.values()) > 0
    assert not {f for f in parts["train"] if len(f) > 100} & {*parts["test"]}


def test_an_eighth_or_so_is_held_out():
    train, test = (len(python_text(name)) for name in ("train", "test"))
    assert train > 5_000_000
    assert 0.05 < test / (train + test) < 0.25


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="python_text: unknown split 'val'; pass 'train'"):
        inspect.unwrap(python_text.__wrapped__)("val")


def test_windows_follow_one_another_and_targets_are_one_ahead():
    text = np.arange(33, dtype=np.uint8)
    windows = ByteWindows(text, 8)
    assert len(windows) == 4
    batch = windows.batch(np.array([3, 0]), np.random.default_rng(0))
    np.testing.assert_array_equal(batch["tokens"], [range(24, 32), range(8)])
    np.testing.assert_array_equal(batch["targets"], [range(25, 33), range(1, 9)])
    assert batch["tokens"].dtype == np.int32
    # One byte less, and the last window has no last target.
    assert len(ByteWindows(text[:-1], 8)) == 3


def test_an_epoch_reads_every_window_once():
    windows = ByteWindows(np.arange(65, dtype=np.uint8), 4)
    seen = [b["tokens"][:, 0] for b in batches(windows, 4, seed=3, num_epochs=1)]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(0, 64, 4))


@pytest.mark.parametrize("length", [0, 10])
def test_impossible_length_is_named(length):
    with pytest.raises(ValueError, match=f"length={length} must be positive and less than .* 10"):
        ByteWindows(np.zeros(10, np.uint8), length)
