"""Pictures of bright rectangles: boxes must stay around them whatever is done to the picture."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from jaxmodels.data import FixedSize, ShortestSide, batches, coco_detection, evaluation_batches

# Only flips draw from it, which are looked for in one test.
RNG = np.random.default_rng(0)
RULE = ShortestSide(32, 60, 4)


def write(folder, scenes):
    """`scenes`: (rows, columns) and integer boxes, drawn as white rectangles on black."""
    images, rows = [], []
    for number, ((height, width), boxes) in enumerate(scenes):
        picture = np.zeros((height, width, 3), np.uint8)
        for left, top, right, bottom in boxes:
            picture[top:bottom, left:right] = 255
            bbox = [left, top, right - left, bottom - top]
            row = {"id": len(rows), "image_id": number, "category_id": 1, "bbox": bbox}
            rows.append(row | {"area": bbox[2] * bbox[3]})
        Image.fromarray(picture).save(folder / f"{number}.png")
        images += [{"id": number, "file_name": f"{number}.png", "height": height, "width": width}]
    content = {"images": images, "categories": [{"id": 1, "name": "box"}], "annotations": rows}
    (folder / "instances.json").write_text(json.dumps(content))
    return content


def read(folder, **options):
    return coco_detection(
        folder / "instances.json", folder, **{"resize": RULE, "train": True} | options
    )


def random_scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = rng.integers(16, 90, 2)
        low = rng.integers(0, (width // 2, height // 2))
        high = rng.integers(low + 5, (width + 1, height + 1))
        yield (int(height), int(width)), [(*low.tolist(), *high.tolist())]


@pytest.mark.parametrize("resize", [RULE, FixedSize(37, 41)])
@pytest.mark.parametrize("flip", [False, True])
def test_boxes_stay_around_what_they_show(tmp_path, resize, flip):
    write(tmp_path, random_scenes(20))
    dataset = read(tmp_path, resize=resize, flip=flip)
    plain = dataclasses.replace(dataset, flip=False).batch(np.arange(20), RNG)
    batch = dataset.batch(np.arange(20), RNG)
    assert batch["image"].dtype == batch["boxes"].dtype == np.float32
    assert np.abs(batch["image"]).max() <= 1
    for image, (rows, columns), (box,) in zip(
        batch["image"], batch["image_size"], batch["boxes"], strict=True
    ):
        assert not image[rows:].any() and not image[:, columns:].any()
        ys, xs = np.nonzero(image[:rows, :columns, 0] > 0)
        seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        np.testing.assert_allclose(box, seen, atol=0.75)
    mirrored = np.any(batch["image"] != plain["image"], axis=(1, 2, 3))
    assert np.any(mirrored) == flip and not np.all(mirrored)
    for name in set(batch) - {"image", "boxes"}:
        np.testing.assert_array_equal(batch[name], plain[name])


def test_pictures_are_scaled_bilinearly_with_antialiasing(tmp_path):
    write(tmp_path, [((44, 64), []), ((17, 23), [])])
    pictures = [RNG.integers(0, 256, shape, np.uint8) for shape in ((44, 64, 3), (17, 23, 3))]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    batch = read(tmp_path).batch(np.arange(2), RNG)
    assert batch["image"].shape == (2, 32, 60, 3)
    for picture, image, (rows, columns), scale in zip(
        pictures, batch["image"], batch["image_size"], batch["scale"], strict=True
    ):
        planes = torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32))[None]
        size = (int(rows), int(columns))
        want = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
        got = (image[:rows, :columns] + 1) * 127.5
        np.testing.assert_allclose(got, want[0].permute(1, 2, 0), atol=1.01)
        np.testing.assert_allclose(scale, np.divide(size, picture.shape[:2]), rtol=1e-6)
    grey = read(tmp_path, channels=1).batch(np.array([1]), RNG)["image"]
    assert grey.shape == (1, 32, 60, 1)


def test_batches_have_few_shapes_and_depend_on_seed_and_number_alone(tmp_path):
    write(tmp_path, random_scenes(23))
    dataset = pickle.loads(pickle.dumps(read(tmp_path, flip=True)))
    tall = int(dataset.groups.sum())
    assert 4 <= tall <= 19
    stream = list(batches(dataset, 2, seed=3, num_epochs=2))
    assert len(stream) == 2 * (tall // 2 + (23 - tall) // 2)
    for epoch in (stream[: len(stream) // 2], stream[len(stream) // 2 :]):
        ids = [int(i) for batch in epoch for i in batch["image_id"]]
        assert len(ids) == len(set(ids)) >= 21
        shapes = [batch["image"].shape for batch in epoch]
        assert set(shapes) == {(2, 32, 60, 3), (2, 60, 32, 3)}
        assert shapes != sorted(shapes) and shapes != sorted(shapes)[::-1]  # they are mixed
        for batch in epoch:
            assert len(set(dataset.groups[batch["image_id"]])) == 1
    resumed = batches(dataset, 2, seed=3, num_epochs=2)
    resumed.set_state({"next_batch": 13})
    for got, want in itertools.islice(zip(resumed, stream[13:], strict=True), 3):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
    # Mixed by hand, a batch is square.
    mixed = dataset.batch(np.array([np.argmin(dataset.groups), np.argmax(dataset.groups)]), RNG)
    assert mixed["image"].shape == (2, 60, 60, 3)


def test_boxes_that_do_not_fit_are_said_and_counted_in_training(tmp_path):
    boxes = [(0, 0, 5, 5), (0, 10, 6, 16), (10, 0, 13, 3), (10, 10, 19, 19)]
    content = write(tmp_path, [((20, 20), boxes), ((20, 20), []), ((20, 20), boxes[:3])])
    content["annotations"][3]["iscrowd"] = 1  # the largest
    (tmp_path / "instances.json").write_text(json.dumps(content))
    message = "coco_detection: 3 boxes of 2 pictures do not fit into max_boxes=2; the fullest has 4"
    with pytest.warns(UserWarning, match=f"{message}. Crowds are left out first"):
        dataset = read(tmp_path, max_boxes=2, resize=FixedSize(20, 20))
    assert dataset.boxes_left_out == 3
    batch = dataset.batch(np.arange(3), RNG)
    assert batch["boxes_left_out"].tolist() == [2, 0, 1]
    np.testing.assert_array_equal(batch["boxes"][[0, 2]], [boxes[:2], boxes[:2]])
    assert batch["box_labels"].tolist() == [[0, 0], [-1, -1], [0, 0]]
    with pytest.raises(
        ValueError, match=f"{message}. Evaluation must see all; pass max_boxes=None"
    ):
        read(tmp_path, max_boxes=2, train=False)
    whole = read(tmp_path, train=False)
    assert whole.max_boxes == 4
    assert "boxes_left_out" not in whole.batch(np.arange(3), RNG)
    roomy = read(tmp_path, max_boxes=7)
    assert roomy.batch(np.arange(2), RNG)["boxes"].shape == (2, 7, 4)


def test_boxes_without_an_area_are_for_evaluation_only(tmp_path):
    write(tmp_path, [((20, 20), [(3, 4, 3, 9), (1, 2, 5, 7), (20, 20, 20, 20)])])
    train, test = read(tmp_path), read(tmp_path, train=False)
    assert (train.boxes_empty, train.max_boxes) == (2, 1) and (
        test.boxes_empty,
        test.max_boxes,
    ) == (0, 3)
    np.testing.assert_allclose(
        train.batch(np.array([0]), RNG)["boxes"][0], [[1.6, 3.2, 8, 11.2]], rtol=1e-6
    )


def test_pictures_without_objects_alone_have_one_empty_place(tmp_path):
    write(tmp_path, [((20, 20), [])])
    batch = read(tmp_path).batch(np.array([0]), RNG)
    assert batch["boxes"].shape == (1, 1, 4) and batch["box_labels"].tolist() == [[-1]]


def test_evaluation_sees_every_picture_once_in_the_same_shapes(tmp_path):
    write(tmp_path, random_scenes(11))
    dataset = read(tmp_path, train=False)
    stream = list(evaluation_batches(dataset, 4))
    assert {batch["image"].shape for batch in stream} == {(4, 32, 60, 3), (4, 60, 32, 3)}
    real = np.concatenate([batch["image_id"][~batch["filler"]] for batch in stream])
    assert sorted(real.tolist()) == list(range(11))


def test_pictures_that_are_not_what_was_annotated_are_named(tmp_path):
    write(tmp_path, [((20, 30), [])])
    dataset = read(tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png' is 30 x 20 pixels, its annotation says 20 x 30"):
        dataset.batch(np.array([0]), RNG)
    (tmp_path / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"0\.png' cannot be decoded: .*; repair or remove it"):
        dataset.batch(np.array([0]), RNG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, "channels=4; pass 3 for colour or 1 for grey"),
        ({"max_boxes": 0}, "max_boxes=0; pass at least 1, or None for all"),
        ({"flip": True, "train": False}, "flip=True mirrors at random; pass train=True with it"),
    ],
)
def test_impossible_options_are_named(tmp_path, options, message):
    write(tmp_path, [((20, 20), [])])
    with pytest.raises(ValueError, match=f"coco_detection: {message}"):
        read(tmp_path, **options)
