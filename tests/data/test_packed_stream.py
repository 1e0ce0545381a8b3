"""The streaming packer against what it reads, and its saved positions."""

import itertools
import json

import grain
import numpy as np
import pytest

from jaxmodels.data import PackedStream, TokenDocuments, pack_documents

LENGTH, WINDOW, SIZES = 11, 5, (9, 3, 1, 30, 4, 7, 2, 12, 5, 6, 1, 8, 3)


def documents():
    tokens = np.arange(1, 1 + sum(SIZES), dtype=np.int32)
    return TokenDocuments.join(np.split(tokens, np.cumsum(SIZES)[:-1]))


def stream(*, repeat=1, window=WINDOW, source=None):
    source = grain.MapDataset.source(documents() if source is None else source)
    return PackedStream(source.repeat(repeat).to_iter_dataset(), LENGTH, window=window)


def pairs(rows):
    return sorted(
        (int(token), int(target))
        for row in rows
        for token, target, weight in zip(row["tokens"], row["targets"], row["weights"], strict=True)
        if weight
    )


def assert_same(found, want):
    assert len(found) == len(want)
    for one, other in zip(found, want, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_every_target_of_the_stream_occurs_once():
    want = [(int(a), int(b)) for d in documents() for a, b in itertools.pairwise(d)]
    for repeat, window in ((1, WINDOW), (1, 1), (2, 7), (1, 1000)):
        rows = list(stream(repeat=repeat, window=window))
        assert pairs(rows) == sorted(want * repeat)
        assert all(row["tokens"].shape == (LENGTH,) for row in rows)


def test_windows_are_packed_apart_and_mixed():
    sizes = np.random.default_rng(0).integers(2, LENGTH + 2, 300)
    flat = np.arange(1, 1 + sizes.sum(), dtype=np.int32)
    source = np.split(flat, np.cumsum(sizes)[:-1])
    rows = list(stream(source=TokenDocuments.join(source), window=100))
    firsts, start = [], 0
    for window in (source[:100], source[100:200], source[200:]):
        packed = pack_documents(TokenDocuments.join(window), LENGTH)
        whole = packed.batch(np.arange(len(packed)), np.random.default_rng(0))["tokens"]
        given = np.stack([row["tokens"] for row in rows[start : start + len(packed)]])
        assert sorted(given.tolist()) == sorted(whole.tolist())
        firsts.append([whole.tolist().index(row) for row in given.tolist()])
        start += len(packed)
    assert start == len(rows)
    # Neither the order of first fit, nor the same one each time.
    assert all(order != sorted(order) for order in firsts)
    assert firsts[0][:9] != firsts[1][:9]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_position_is_json_small_and_continues_with_exactly_the_next(batch_size):
    def open_stream():
        rows = stream(repeat=4)
        return iter(rows if batch_size is None else rows.batch(batch_size, drop_remainder=True))

    want = list(open_stream())
    for position in range(len(want) + 1):
        read = open_stream()
        assert_same(list(itertools.islice(read, position)), want[:position])
        state = json.dumps(read.get_state())
        assert len(state) < 300
        fresh = open_stream()
        fresh.set_state(json.loads(state))
        assert json.dumps(fresh.get_state()) == state
        assert_same(list(fresh), want[position:])
        # And on an iterator that is somewhere else.
        read.set_state(json.loads(state))
        assert_same(list(read), want[position:])


def test_state_does_not_change_once_taken():
    read = iter(stream())
    state = read.get_state()
    before = json.dumps(state)
    want = list(read)
    assert json.dumps(state) == before
    read.set_state(state)
    next(read)
    assert json.dumps(state) == before
    assert_same(list(read), want[1:])


class Live(grain.IterDataset):
    """Documents from an iterator that hands out, keeps and changes one and the same state."""

    def __iter__(self):
        return LiveIterator()


class LiveIterator(grain.DatasetIterator):
    def __init__(self):
        super().__init__()
        self.state = {"next": 0}

    def __next__(self):
        if self.state["next"] == len(SIZES):
            raise StopIteration
        self.state["next"] += 1
        return documents()[self.state["next"] - 1]

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def test_positions_survive_a_parent_that_changes_its_own():
    def open_stream():
        return iter(PackedStream(Live(), LENGTH, window=WINDOW))

    want = list(open_stream())
    for position in range(len(want) + 1):
        read, fresh = open_stream(), open_stream()
        assert_same(list(itertools.islice(read, position)), want[:position])
        fresh.set_state(read.get_state())
        for _ in range(2):
            state = fresh.get_state()
            next(fresh, None)
            fresh.set_state(state)
        assert_same(list(fresh), want[position:])


def test_same_in_reading_threads():
    read = iter(stream(repeat=3).map(lambda row: row))
    ahead = iter(stream(repeat=3).mp_prefetch(grain.MultiprocessingOptions(num_workers=0)))
    assert_same(list(ahead), list(read))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="PackedStream: window=0 must be positive"):
        stream(window=0)
    source = grain.MapDataset.source(documents()).to_iter_dataset()
    with pytest.raises(ValueError, match="pack_documents: document 2 of 7 has 30 tokens"):
        next(iter(PackedStream(source, LENGTH, window=7, long="refuse")))
    with pytest.raises(ValueError, match=r"set_state got the keys \['next_batch'\], not 'parent'"):
        iter(stream()).set_state({"next_batch": 3})
    closed = iter(stream())
    next(closed)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        next(closed)
