"""Packing against its definition, piece by piece, and against what it must preserve."""

import inspect
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmodels.data import (
    Dataset,
    TokenDocuments,
    batches,
    first_fit_decreasing,
    pack_documents,
    pad_documents,
)

LENGTH = 7
SIZES = (19, 5, 1, 8, 3, 0, 2, 13, 4, 9)


def documents(sizes=SIZES):
    """Documents whose tokens are all different, so that each tells where it comes from."""
    tokens = np.arange(1, 1 + sum(sizes), dtype=np.int32)
    return TokenDocuments.join(np.split(tokens, np.cumsum(sizes)[:-1]))


def first_fit(sizes, capacity):
    """The definition: one thing after the other, each into the first bin that has room."""
    room, chosen = [], []
    for size in sizes:
        fitting = (number for number, left in enumerate(room) if left >= size)
        number = next(fitting, len(room))
        if number == len(room):
            room.append(capacity)
        room[number] -= size
        chosen.append(number)
    return chosen


@given(
    capacity=st.integers(1, 40),
    shares=st.lists(st.floats(0, 1, exclude_max=True), max_size=60),
)
def test_is_first_fit_of_the_decreasing_sizes(capacity, shares):
    sizes = np.array([1 + int(share * capacity) for share in shares], int)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    want = np.empty(len(sizes), int)
    want[order] = first_fit(sizes[order], capacity)
    np.testing.assert_array_equal(first_fit_decreasing(sizes, capacity), want)


def test_hundred_thousand_documents_take_less_than_two_seconds():
    sizes = np.random.default_rng(0).lognormal(5.5, 1.2, 100_000).astype(int)
    packed = TokenDocuments(np.zeros(sizes.sum(), np.int32), np.cumsum(sizes))
    start = time.process_time()
    assert pack_documents(packed, 2048).fill > 0.999
    assert time.process_time() - start < 2


@pytest.mark.parametrize("sizes", [[3, 0], [-1, 2], [4, 8, 2]])
def test_sizes_that_fit_no_bin_are_named(sizes):
    message = f"sizes from {min(sizes)} to {max(sizes)} must lie between 1 and capacity=7"
    with pytest.raises(ValueError, match=f"first_fit_decreasing: {message}"):
        first_fit_decreasing(np.array(sizes), 7)


def pairs(batch):
    """(token, target, position) of all real targets."""
    real = batch["weights"] > 0
    names = ("tokens", "targets", "positions")
    return sorted(zip(*(batch[n][real].tolist() for n in names), strict=True))


def whole(rows):
    return rows.batch(np.arange(len(rows)), np.random.default_rng(0))


@pytest.mark.parametrize("make", [pack_documents, pad_documents])
def test_every_target_occurs_once_after_its_token(make):
    rows = make(documents(), LENGTH)
    assert isinstance(rows, Dataset)
    want = sorted(
        (int(tokens[i]), int(tokens[i + 1]), i % LENGTH)
        for tokens in documents()
        for i in range(len(tokens) - 1)
    )
    assert pairs(whole(rows)) == want


def test_rows_hold_whole_pieces_and_say_where_each_is():
    batch = whole(pack_documents(documents(), LENGTH))
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "weights": "float32",
    }
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        count = np.count_nonzero(ids)
        np.testing.assert_array_equal(batch["weights"][row], ids > 0)
        assert not ids[count:].any() and np.isin(np.diff(ids[:count]), [0, 1]).all()
        assert ids[0] == 1 and not batch["tokens"][row, count:].any()
        assert not batch["targets"][row, count:].any()
        for segment in {*ids.tolist()}:
            inside = ids == segment
            np.testing.assert_array_equal(batch["positions"][row, inside], range(inside.sum()))
            if segment:
                tokens = batch["tokens"][row, inside]
                np.testing.assert_array_equal(np.diff(tokens), 1)
                np.testing.assert_array_equal(batch["targets"][row, inside], tokens + 1)


def test_packs_into_the_fewest_and_pads_one_a_row():
    packed, padded = (make(documents(), LENGTH) for make in (pack_documents, pad_documents))
    # Targets 18, 4, 7, 2, 1, 12, 3, 8 in pieces of at most 7: 55 places.
    assert len(packed) == 8 and len(padded) == 12
    assert packed.fill == 55 / 56 and padded.fill == 55 / 84
    first = padded.batch(np.array([3, 0]), np.random.default_rng(0))
    np.testing.assert_array_equal(first["tokens"], [[20, 21, 22, 23, 0, 0, 0], range(1, 8)])
    np.testing.assert_array_equal(first["positions"], [[0, 1, 2, 3, 0, 1, 2], range(7)])
    np.testing.assert_array_equal(first["segment_ids"], [[1, 1, 1, 1, 0, 0, 0], [1] * 7])


def test_an_epoch_of_batches_reads_every_sequence():
    rows = pack_documents(documents(), LENGTH)
    read = list(batches(rows, 2, seed=3, num_epochs=1))
    joined = {name: np.concatenate([batch[name] for batch in read]) for name in read[0]}
    assert pairs(joined) == pairs(whole(rows))


@pytest.mark.parametrize("make", [pack_documents, pad_documents])
def test_bad_input_is_named(make):
    name = make.__name__
    refused = r"document 3 of 5 has 8 tokens, .* = 7, and so have 1 others; pass length=8 or"
    with pytest.raises(ValueError, match=f"{name}: {refused}"):
        make(documents((2, 5, 7, 8, 9)), 6, long="refuse")
    assert len(make(documents((2, 5, 7)), 6, long="refuse")) == {"pack": 2, "pad_": 3}[name[:4]]
    with pytest.raises(ValueError, match=f"{name}: length=0 must be positive"):
        make(documents(), 0)
    with pytest.raises(ValueError, match=f"{name}: long='cut' is neither 'split' nor 'refuse'"):
        inspect.unwrap(make)(documents(), LENGTH, long="cut")
    with pytest.raises(ValueError, match=f"{name}: none of 3 documents has two tokens"):
        make(documents((1, 0, 1)), LENGTH)
