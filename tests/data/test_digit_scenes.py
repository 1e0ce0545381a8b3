"""Scenes whose masks, boxes and labels must tell of the same digits as the picture."""

import inspect
import json

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jaxmodels.data import Dataset, batches, digit_scenes, digits

KEYS = {"image", "mask", "instances", "boxes", "box_labels"}


def test_mask_boxes_and_labels_agree():
    scenes = digit_scenes("train", size=40, canvas=(48, 56), count=(1, 4), max_overlap=0.0)
    assert isinstance(scenes, Dataset)
    batch = scenes.batch(np.arange(40), np.random.default_rng(0))
    assert set(batch) == KEYS
    assert batch["image"].shape == (40, 48, 56, 1) and batch["image"].dtype == np.float32
    assert all(batch[name].dtype == np.int32 for name in ("mask", "instances", "box_labels"))
    for i in range(40):
        image, instances = batch["image"][i, ..., 0], batch["instances"][i]
        # Without noise and overlaps the ink is what is brighter than a quarter.
        np.testing.assert_array_equal(image > -0.5, instances > 0)
        labels = batch["box_labels"][i]
        for number, (box, label) in enumerate(zip(batch["boxes"][i], labels, strict=True)):
            rows, columns = np.nonzero(instances == number + 1)
            assert (len(rows) > 0) == (label >= 0)
            if label >= 0:
                seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_array_equal(box, seen)
                assert np.all(batch["mask"][i][instances == number + 1] == label + 1)
            else:
                assert not box.any()
        assert np.all((batch["mask"][i] > 0) == (instances > 0))
    counts = (batch["box_labels"] >= 0).sum(axis=1)
    assert counts.min() >= 1 and len(set(counts.tolist())) == 4
    heights = (batch["boxes"][..., 3] - batch["boxes"][..., 1])[batch["box_labels"] >= 0]
    assert heights.min() <= 12 and 36 < heights.max() <= 48  # scales 1 to 6


def test_overlap_is_limited_and_happens():
    options = {"canvas": (40, 40), "count": (5, 5), "scale": (1.0, 4.0)}
    scenes = digit_scenes("train", size=60, max_overlap=0.3, **options)
    batch = scenes.batch(np.arange(60), np.random.default_rng(0))
    worst = 0.0
    for boxes, labels in zip(batch["boxes"], batch["box_labels"], strict=True):
        real = boxes[labels >= 0]
        for i in range(len(real)):
            for j in range(i):
                low = np.maximum(real[i, :2], real[j, :2])
                high = np.minimum(real[i, 2:], real[j, 2:])
                areas = [np.prod(b[2:] - b[:2]) for b in (real[i], real[j])]
                worst = max(worst, np.prod(np.clip(high - low, 0, None)) / min(areas))
    assert 0.2 < worst <= 0.3


def test_a_scene_is_a_function_of_seed_and_number():
    options = {"size": 50, "canvas": (32, 32), "scale": (1.0, 3.0), "noise": 0.1, "clutter": 2}
    scenes = digit_scenes("train", seed=1, **options)
    again = digit_scenes("train", seed=1, **options)
    want = scenes.batch(np.arange(50), np.random.default_rng(0))
    shuffled = np.random.default_rng(1).permutation(50)
    got = again.batch(shuffled, np.random.default_rng(7))
    for name in KEYS:
        np.testing.assert_array_equal(got[name], want[name][shuffled])
        np.testing.assert_array_equal(scenes[3][name], want[name][3])
    for split, seed in (("train", 2), ("test", 1)):
        other = digit_scenes(split, seed=seed, **options)
        assert np.any(other[3]["image"] != scenes[3]["image"])
    assert len({image.tobytes() for image in want["image"]}) == 50
    # More of them begin with the same.
    longer = digit_scenes("train", seed=1, **options | {"size": 500})
    np.testing.assert_array_equal(longer[3]["image"], scenes[3]["image"])


def test_splits_show_different_digits_in_full():
    """At scale one a lone digit is the picture itself, which belongs to one split."""
    options = {"size": 30, "canvas": (8, 8), "count": (1, 1), "scale": (1.0, 1.0)}
    pictures = {split: digits(split).arrays()[0][..., 0] for split in ("train", "test")}
    for split in pictures:
        batch = digit_scenes(split, **options).batch(np.arange(30), np.random.default_rng(0))
        for image, box in zip(batch["image"][..., 0], batch["boxes"][:, 0], strict=True):
            left, top, right, bottom = box.astype(int)
            ink = image[top:bottom, left:right]
            found = {
                name: any(
                    np.array_equal(whole[y : y + ink.shape[0], x : x + ink.shape[1]], ink)
                    for whole in all_of
                    for y in range(9 - ink.shape[0])
                    for x in range(9 - ink.shape[1])
                )
                for name, all_of in pictures.items()
            }
            assert found[split] and not found["test" if split == "train" else "train"]


def test_one_digit_has_the_label_of_what_it_shows():
    options = {"canvas": (8, 8), "count": (1, 1), "scale": (1.0, 1.0)}
    rng = np.random.default_rng(0)
    batch = digit_scenes("test", size=200, **options).batch(np.arange(200), rng)
    np.testing.assert_array_equal(batch["label"], batch["box_labels"][:, 0])
    shifted = digit_scenes("train", size=2000, **options).batch(np.arange(2000), rng)
    judge = KNeighborsClassifier(3).fit(shifted["image"].reshape(2000, -1), shifted["label"])
    assert judge.score(batch["image"].reshape(200, -1), batch["label"]) > 0.9
    assert set(batch["label"].tolist()) == set(range(10))


def test_noise_and_clutter_change_the_picture_only():
    plain = {"size": 5, "canvas": (40, 40), "count": (1, 1), "scale": (2.0, 3.0)}
    quiet = digit_scenes("train", **plain)[0]
    noisy = digit_scenes("train", noise=0.2, **plain)[0]
    for name in KEYS - {"image"}:
        np.testing.assert_array_equal(noisy[name], quiet[name])
    difference = (noisy["image"] - quiet["image"])[quiet["instances"] > 0]
    assert 0.05 < difference.std() < 0.25 and np.abs(noisy["image"]).max() <= 1
    cluttered = digit_scenes("train", clutter=8, **plain)[0]
    assert np.mean((cluttered["image"][..., 0] > -0.5) & (cluttered["instances"] == 0)) > 0.02


def test_batches_workers_and_resuming():
    scenes = digit_scenes("train", size=30, canvas=(24, 24), scale=(1.0, 2.0))
    stream = batches(scenes, 8, seed=0)
    first = next(stream)
    assert first["image"].shape == (8, 24, 24, 1) and set(first) == KEYS
    resumed = batches(scenes, 8, seed=0)
    resumed.set_state(json.loads(json.dumps(stream.get_state())))
    np.testing.assert_array_equal(next(resumed)["image"], next(stream)["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "unknown split 'val'; pass 'train' or 'test'"),
        ({"size": 0}, "size=0 must be at least 1"),
        ({"count": (3, 2)}, r"count=\(3, 2\) must be two numbers in order, from 1"),
        ({"scale": (0.0, 2.0)}, r"scale=\(0.0, 2.0\) must be two numbers in order, above 0"),
        ({"canvas": (30, 15), "scale": (2.0, 3.0)}, r"canvas=\(30, 15\) is smaller than a digit"),
        ({"max_overlap": 1.5}, r"max_overlap=1.5 is outside \[0, 1\]"),
        ({"noise": -1.0}, "noise=-1.0 and clutter=0 must not be negative"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=f"digit_scenes: {message}"):
        inspect.unwrap(digit_scenes)(**{"split": "train", "size": 3} | options)
