"""Batches of data sets whose examples come in groups, which must not be mixed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.data import batches


@dataclasses.dataclass(frozen=True)
class Plain:
    """Examples that are their number."""

    size: int

    def __len__(self):
        return self.size

    def batch(self, indices, rng):
        return {"label": indices}


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Examples that are their number, in groups."""

    groups: np.ndarray

    def __len__(self):
        return len(self.groups)

    def batch(self, indices, rng):
        return {"label": indices}


def labels_of(stream):
    return [batch["label"].tolist() for batch in stream]


@settings(deadline=None, max_examples=20)
@given(
    groups=st.lists(st.integers(0, 2), min_size=30, max_size=60),
    batch_size=st.integers(1, 3),
    process_count=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**40),
)
def test_no_batch_mixes_groups_and_processes_read_the_same_group_at_once(
    groups, batch_size, process_count, seed
):
    groups = np.array([*groups, *[0] * 6, *[1] * 6, *[2] * 6])
    shares = [
        labels_of(
            batches(
                Grouped(groups),
                batch_size,
                seed=seed,
                num_epochs=2,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]
    per_epoch = int(np.sum(np.bincount(groups) // process_count // batch_size))
    epochs = []
    for start in (0, per_epoch):
        turns = list(zip(*(part[start : start + per_epoch] for part in shares), strict=True))
        assert len(turns) == per_epoch
        for turn in turns:
            assert [len(batch) for batch in turn] == [batch_size] * process_count
            assert len(set(groups[np.concatenate(turn)])) == 1
        seen = [label for turn in turns for batch in turn for label in batch]
        assert len(seen) == len(set(seen))
        # Less than a batch of every process is left of each group.
        unread = np.bincount(groups) - np.bincount(groups[seen], minlength=3)
        assert np.all(unread < batch_size * process_count)
        epochs.append([int(groups[turn[0][0]]) for turn in turns])
    assert sorted(epochs[0]) == sorted(epochs[1])
    # Forty-eight batches and more come sorted once in 10^20 times.
    assert per_epoch < 48 or epochs[0] not in (sorted(epochs[0]), epochs[1])


def test_a_single_group_is_as_good_as_none_and_groups_unshuffled_follow_each_other():
    # The order that positions saved before there were groups count on.
    keys = [np.random.SeedSequence(4, spawn_key=(0, epoch)) for epoch in range(2)]
    orders = [np.random.default_rng(key).permutation(11)[:9].reshape(3, 3) for key in keys]
    plain = np.concatenate(orders).tolist()
    for dataset in (Plain(11), Grouped(np.zeros(11, int))):
        assert labels_of(batches(dataset, 3, seed=4, num_epochs=2)) == plain
    groups = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0])
    got = labels_of(batches(Grouped(groups), 2, seed=0, shuffle=False, num_epochs=1))
    assert got == [[1, 2], [5, 8], [0, 3], [4, 6]]


def test_groups_that_fill_no_batch_are_said():
    groups = np.array([0, 0, 0, 0, 1, 2, 2])
    with pytest.warns(UserWarning, match="3 of 7 examples are never read, because their groups do"):
        stream = batches(Grouped(groups), 4, seed=0, num_epochs=1)
    assert [sorted(batch) for batch in labels_of(stream)] == [[0, 1, 2, 3]]
    with pytest.raises(
        ValueError, match=r"batch_size=5 for process_count=1 .* at most 4; pass less"
    ):
        batches(Grouped(groups), 5, seed=0)
