"""Order, position and shares of the batch stream, in one process and in several."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.data import ImageDataset, batches, digits


def numbered(size, *, flip=False):
    """Pictures that can be told apart: the label is the number of the picture."""
    rng = np.random.default_rng(0)
    return ImageDataset(
        pixels=rng.integers(0, 256, (size, 3, 5, 2), np.uint8),
        labels=np.arange(size, dtype=np.int32),
        class_names=tuple(map(str, range(size))),
        flip=flip,
    )


def labels_of(iterator, count=None):
    return [batch["label"].tolist() for batch in itertools.islice(iterator, count)]


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_indexing_scales_levels_to_unit_range():
    dataset = numbered(7)
    images, labels = dataset.arrays()
    np.testing.assert_allclose(images, dataset.pixels / 127.5 - 1, atol=1e-7)
    assert images.dtype == np.float32 and len(dataset) == 7 and dataset.image_shape == (3, 5, 2)
    ends = ImageDataset(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1), labels[:1], ("x",))
    assert ends.arrays()[0].ravel().tolist() == [-1, 1]
    for index in (0, 4, np.int64(6)):
        element = dataset[index]
        np.testing.assert_array_equal(element["image"], images[index])
        assert element["label"] == labels[index] and isinstance(element["label"], np.int32)


def test_serves_as_a_grain_source():
    dataset = numbered(7)
    rows = list(grain.MapDataset.source(dataset).shuffle(seed=0))
    assert sorted(int(row["label"]) for row in rows) == list(range(7))


def test_survives_pickling():
    dataset = numbered(5)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy.arrays()[0], dataset.arrays()[0])
    assert copy.class_names == dataset.class_names


def test_split_is_stratified_complete_and_fixed_by_the_seed():
    dataset = dataclasses.replace(numbered(50), labels=np.repeat(np.int32([0, 1, 2]), [20, 20, 10]))
    train, test = dataset.split(held_out=0.3, seed=0)
    assert np.bincount(train.labels).tolist() == [14, 14, 7]
    assert np.bincount(test.labels).tolist() == [6, 6, 3]
    whole = {(p.tobytes(), int(n)) for p, n in zip(*dataset.arrays(), strict=True)}
    parts = [(p.tobytes(), int(n)) for d in (train, test) for p, n in zip(*d.arrays(), strict=True)]
    assert len(parts) == 50 and set(parts) == whole
    assert_same(dataset.split(held_out=0.3, seed=0)[1][0], test[0])
    other = dataset.split(held_out=0.3, seed=1)[1]
    assert not np.array_equal(other.arrays()[0], test.arrays()[0])


@pytest.mark.parametrize("held_out", [0.0, 1.0, 0.01])
def test_impossible_splits_are_named(held_out):
    dataset = dataclasses.replace(numbered(9), labels=np.repeat(np.int32([0, 1, 2]), 3))
    with pytest.raises(ValueError, match=rf"split: held_out={held_out} .* 9 pictures of 9 classes"):
        dataset.split(held_out=held_out, seed=0)


@settings(deadline=None, max_examples=20)
@given(
    size=st.integers(7, 43),
    batch_size=st.integers(1, 7),
    process_count=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_visits_disjoint_shares_of_the_data_once(size, batch_size, process_count, seed):
    share = size // process_count
    batch_size = min(batch_size, share)
    shares = [
        labels_of(
            batches(
                numbered(size),
                batch_size,
                seed=seed,
                num_epochs=1,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]
    # Equally many full batches everywhere, else processes that train together would hang.
    assert [[len(batch) for batch in part] for part in shares] == (
        [[batch_size] * (share // batch_size)] * process_count
    )
    seen = [label for part in shares for batch in part for label in batch]
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(size))


def test_batches_hold_the_pictures_of_their_labels():
    dataset = numbered(23)
    images, _ = dataset.arrays()
    for batch in batches(dataset, 5, seed=0, num_epochs=2):
        assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"], images[batch["label"]])


def test_every_epoch_and_every_seed_has_its_own_order():
    def orders(seed):
        stream = batches(numbered(20), 5, seed=seed, num_epochs=4)
        flat = list(itertools.chain.from_iterable(labels_of(stream)))
        return [tuple(flat[start : start + 20]) for start in range(0, 80, 20)]

    all_orders = orders(0) + orders(1) + orders(2)
    assert all(sorted(order) == list(range(20)) for order in all_orders)
    # Seeds one apart must not replay each other's epochs.
    assert len(set(all_orders)) == 12
    assert orders(1) == orders(1)


def test_shuffling_is_uniform():
    size, epochs = 6, 3000
    stream = batches(numbered(size), size, seed=0, num_epochs=epochs)
    place = np.array(labels_of(stream))
    counts = np.stack([np.bincount(column, minlength=size) for column in place.T])
    # Each count is binomial(3000, 1/6): deviation 20.4; five of them is once in 10^5 tables.
    np.testing.assert_allclose(counts, epochs / size, atol=5 * 20.4)


def test_without_shuffle_the_order_is_kept_and_the_remainder_dropped():
    got = labels_of(batches(numbered(11), 3, seed=0, shuffle=False, num_epochs=2))
    assert got == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] * 2


def test_mirroring_is_per_picture_fair_fresh_and_reproducible():
    dataset = numbered(41, flip=True)
    images, _ = dataset.arrays()

    def flips(seed, process_index=0, process_count=1):
        stream = batches(
            dataset,
            20,
            seed=seed,
            shuffle=False,
            num_epochs=25,
            process_index=process_index,
            process_count=process_count,
        )
        marks = []
        for batch in stream:
            plain = images[batch["label"]]
            mirrored = np.all(batch["image"] == plain[:, :, ::-1], axis=(1, 2, 3))
            assert np.all(mirrored | np.all(batch["image"] == plain, axis=(1, 2, 3)))
            marks.append(mirrored)
        return np.array(marks)

    marks = flips(0)
    assert marks.shape == (50, 20)
    # Binomial(1000, 1/2) has deviation 16.
    assert abs(marks.sum() - 500) < 5 * 16
    assert len({mark.tobytes() for mark in marks}) == 50
    np.testing.assert_array_equal(flips(0), marks)
    assert not np.array_equal(flips(1), marks)
    first, second = (flips(0, index, 2) for index in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("position", [0, 3, 4, 9])
def test_position_is_json_and_resumes_with_exactly_the_next_batch(position):
    dataset = numbered(17, flip=True)
    stream = batches(dataset, 4, seed=3)
    for _ in range(position):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    want = [next(stream) for _ in range(6)]
    fresh = batches(dataset, 4, seed=3)
    fresh.set_state(state)
    assert fresh.get_state() == state
    for batch in want:
        assert_same(next(fresh), batch)
    # And back again, on an iterator that already reads ahead.
    stream.set_state(state)
    assert_same(next(stream), want[0])


def test_saved_end_of_the_data_stays_the_end():
    stream = batches(numbered(8), 4, seed=0, num_epochs=2)
    assert len(list(stream)) == 4
    fresh = batches(numbered(8), 4, seed=0, num_epochs=2)
    fresh.set_state(stream.get_state())
    assert list(fresh) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_compact_batches_are_bytes_that_a_compiled_step_finishes(num_workers):
    dataset = dataclasses.replace(numbered(17, flip=True), white=200)
    stream = batches(dataset, 4, seed=5, num_workers=num_workers, compact=True)
    finish = jax.jit(dataset.finish)
    for want in itertools.islice(batches(dataset, 4, seed=5), 5):
        batch = next(stream)
        assert batch["image"].dtype == np.uint8
        done = finish(batch)
        assert done["image"].dtype == np.float32
        np.testing.assert_allclose(done["image"], want["image"], rtol=0, atol=3e-7)
        np.testing.assert_array_equal(done["label"], want["label"])
    stream.close()


def test_data_without_a_compact_form_says_so():
    class Counted:
        def __len__(self):
            return 7

        def batch(self, indices, rng):
            return {"number": indices}

    with pytest.raises(ValueError, match=r"batches: compact=True needs .* which Counted lacks"):
        batches(Counted(), 2, seed=0, compact=True)
    assert len(next(batches(Counted(), 2, seed=0))["number"]) == 2


def test_workers_read_the_same_batches_and_exchange_positions_with_none():
    dataset = numbered(17, flip=True)
    want = list(itertools.islice(batches(dataset, 4, seed=5), 9))
    several = batches(dataset, 4, seed=5, num_workers=2)
    for batch in want[:5]:
        assert_same(next(several), batch)
    state = json.loads(json.dumps(several.get_state()))
    alone = batches(dataset, 4, seed=5)
    alone.set_state(state)
    assert_same(next(alone), want[5])
    several.set_state({"next_batch": 7})
    assert_same(next(several), want[7])
    several.close()
    with pytest.raises(ValueError, match="closed"):
        next(several)


STREAM = """
import hashlib, json, sys
from jaxmodels.data import batches, digits

seed, skip, count = map(int, sys.argv[1:])
stream = batches(digits("train"), 256, seed=seed)
stream.set_state({"next_batch": skip})
digest = hashlib.sha256()
for _ in range(count):
    batch = next(stream)
    digest.update(batch["image"].tobytes() + batch["label"].tobytes())
print(json.dumps([digest.hexdigest(), stream.get_state()]))
"""


def in_fresh_process(*arguments):
    command = [sys.executable, "-c", STREAM, *map(str, arguments)]
    environment = {**os.environ, "PYTHONHASHSEED": str(arguments[-1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_fresh_processes_agree_on_the_seed_and_resume_each_other():
    stream = batches(digits("train"), 256, seed=11)
    for _ in range(4):
        next(stream)
    digest = hashlib.sha256()
    for _ in range(3):
        batch = next(stream)
        digest.update(batch["image"].tobytes() + batch["label"].tobytes())
    here = [digest.hexdigest(), stream.get_state()]
    assert in_fresh_process(11, 4, 3) == here
    assert in_fresh_process(12, 4, 3)[0] != here[0]


LEFT_OPEN = """
import os, signal, sys
from jaxmodels.data import batches, digits

if __name__ == "__main__":
    stream = batches(digits("test"), 32, seed=0, num_workers=2)
    for _ in range(5):
        next(stream)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    # A scheduler stops the whole group; this program, like training, wants to finish first.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
        os.killpg(0, number)
    for _ in range(20):
        next(stream)
"""


@pytest.mark.parametrize("end", ["returned", "killed"])
def test_workers_outlive_group_signals_and_end_quietly_with_the_program(tmp_path, end):
    script = tmp_path / "main.py"
    script.write_text(LEFT_OPEN)
    command = [sys.executable, "-W", "error", str(script), end]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Workers inherit the pipes, so reading to their end waits for the last worker.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        start_new_session=True,
        timeout=120,
    )
    assert done.returncode == (0 if end == "returned" else -9)
    if end == "returned":
        assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is out of range; pass at least 1"),
        ({"batch_size": 8}, "batch_size=8 is more than the 7 examples .* of 7; pass at most 7"),
        ({"batch_size": 4, "process_count": 2}, "batch_size=4 .* 3 examples .*process_count=2"),
        ({"num_workers": -1}, "num_workers=-1 is out of range; pass at least 0"),
        ({"seed": -1}, "seed=-1 is out of range; pass at least 0"),
        ({"num_epochs": 0}, "num_epochs=0 is out of range; pass at least 1"),
        ({"process_count": 0}, "process_count=0 is out of range"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 .* pass 0 to 1"),
        ({"process_index": -1}, "process_index=-1 .* pass 0 to 0"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"batches: {message}"):
        batches(numbered(7), **{"batch_size": 2, "seed": 0, **arguments})


def test_foreign_state_is_refused():
    with pytest.raises(ValueError, match=r"set_state got the keys \['next_index'\]"):
        batches(numbered(7), 2, seed=0).set_state({"next_index": 3})


def test_importing_the_room_leaves_scikit_learn_alone():
    code = "import sys, jaxmodels.data; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
