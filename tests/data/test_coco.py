"""Instances files that the tests write: what is read of them, and what is refused."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jaxmodels.data import (
    Dataset,
    FixedSize,
    ShortestSide,
    coco_detection,
    evaluation_batches,
)
from jaxmodels.metrics import DetectionEvaluator
from jaxmodels.ops.detections import Detections

CONTENT = {
    "images": [
        {"id": 42, "file_name": "b.png", "height": 24, "width": 32},
        {"id": 7, "file_name": "deep/a.jpg", "height": 40, "width": 20},
        {"id": 99, "file_name": "empty.png", "height": 8, "width": 8},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    "annotations": [
        {"id": 5, "image_id": 42, "category_id": 90, "bbox": [2, 3, 10, 7], "area": 33.5},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0.5, 1, 9.25, 30], "area": 200},
        {"id": 9, "image_id": 42, "category_id": 3, "bbox": [20, 20, 15.5, 3], "iscrowd": 1},
    ],
}


def write(folder, content=CONTENT):
    for image in CONTENT["images"]:
        path = folder / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"]), (9, 99, 199)).save(path)
    (folder / "instances.json").write_text(json.dumps(content))


def read(folder, **options):
    return coco_detection(
        folder / "instances.json",
        folder / "images",
        **{"resize": ShortestSide(24, 48, 8)} | options,
    )


def changed(part, place, **columns):
    content = copy.deepcopy(CONTENT)
    content[part][place] = {
        key: value for key, value in (content[part][place] | columns).items() if value is not ...
    }
    return content


def test_images_classes_and_boxes_as_pycocotools_reads_them(tmp_path):
    write(tmp_path)
    dataset = read(tmp_path)
    assert isinstance(dataset, Dataset) and len(dataset) == 3
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "instances.json")
    assert dataset.image_ids.tolist() == sorted(coco.getImgIds()) == [7, 42, 99]
    assert list(dataset.category_ids) == sorted(coco.getCatIds()) == [3, 90]
    assert dataset.class_names == ("car", "toothbrush") and dataset.max_boxes == 2
    batch = dataset.batch(np.arange(3), np.random.default_rng(0))
    boxes = batch["boxes"] / batch["scale"][:, None, [1, 0, 1, 0]]
    for i, image_id in enumerate(dataset.image_ids.tolist()):
        rows = coco.imgToAnns[image_id]
        assert batch["image_id"][i] == image_id and np.sum(batch["box_labels"][i] >= 0) == len(rows)
        for box, label, ignored, area, row in zip(
            boxes[i],
            batch["box_labels"][i],
            batch["box_ignored"][i],
            batch["area"][i],
            rows,
            strict=False,
        ):
            left, top, width, height = row["bbox"]
            right = min(left + width, coco.imgs[image_id]["width"])  # one reaches over the edge
            np.testing.assert_allclose(box, [left, top, right, top + height], rtol=1e-6)
            assert dataset.category_ids[label] == row["category_id"]
            assert ignored == bool(row.get("iscrowd"))
            assert area == row.get("area", width * height)
    assert dataset.boxes_clipped == 1 and dataset.boxes_left_out == dataset.boxes_empty == 0


def test_scores_of_batches_are_those_of_pycocotools_on_the_files(tmp_path):
    """Resized and back: with a stretched picture, several groups, a crowd and fillers."""
    content = changed("annotations", 2, bbox=[20, 20, 12, 3], area=36)
    for row in content["annotations"]:
        row.setdefault("iscrowd", 0)
    write(tmp_path, content)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "instances.json")
        found = [
            {"image_id": 42, "category_id": 90, "bbox": [2, 3, 10, 5], "score": 0.5},
            {"image_id": 42, "category_id": 90, "bbox": [2, 3, 8.75, 7], "score": 0.25},
            {"image_id": 42, "category_id": 3, "bbox": [25, 20, 5, 3], "score": 0.75},
            {"image_id": 99, "category_id": 90, "bbox": [1, 1, 3, 3], "score": 0.375},
            {"image_id": 7, "category_id": 3, "bbox": [0.5, 1, 9.25, 25], "score": 0.25},
        ]
        judge = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    for resize in (ShortestSide(24, 48, 8), FixedSize(13, 29)):
        dataset = read(tmp_path, resize=resize)
        evaluator = DetectionEvaluator(2)
        for batch in evaluation_batches(dataset, 2):
            detections = Detections(
                np.zeros((2, 3, 4)), np.zeros((2, 3)), np.full((2, 3), -1), np.zeros((2, 3), bool)
            )
            for i, image_id in enumerate(batch["image_id"]):
                mine = [row for row in found if row["image_id"] == image_id]
                scale = np.asarray(batch["scale"][i], float)[[1, 0, 1, 0]]
                for j, row in enumerate(mine):
                    x, y, width, height = row["bbox"]
                    detections.boxes[i, j] = np.array([x, y, x + width, y + height]) * scale
                    detections.scores[i, j] = row["score"]
                    detections.classes[i, j] = dataset.category_ids.index(row["category_id"])
                    detections.valid[i, j] = True
            evaluator.add_batch(detections, batch)
        got = list(evaluator.coco().figures().values())
        np.testing.assert_allclose(got, np.where(judge.stats < 0, np.nan, judge.stats), atol=1e-9)


@pytest.mark.parametrize(
    ("part", "place", "columns", "message"),
    [
        (
            "annotations",
            0,
            {"category_id": 4},
            r"1 of 3 annotations have a category_id that is not among the categories: "
            r"annotation 5 \(4\); correct",
        ),
        ("annotations", 1, {"image_id": 8}, r"image_id that is not among the images: annotation 2"),
        ("annotations", 1, {"id": 5}, "1 of 3 ids of annotations come twice: 5; give each an id"),
        ("images", 1, {"id": 42}, "1 of 3 ids of images come twice: 42"),
        ("categories", 0, {"id": 3}, "1 of 2 ids of categories come twice: 3"),
        (
            "annotations",
            1,
            {"id": ...},
            r"annotations have a 'id' that is not integers: None of en",
        ),
        ("images", 0, {"id": "42"}, "images have a 'id' that is not integers: '42' of 42"),
        ("images", 0, {"file_name": ...}, "images have a 'file_name' that is not text: None of 42"),
        ("images", 0, {"width": 0}, "'width' that is not a positive integer: 0 of 42; correct it"),
        ("images", 0, {"height": ...}, "'height' that is not a positive integer: None of 42"),
        (
            "annotations",
            0,
            {"bbox": [1, 2, 3]},
            r"'bbox' that is not four numbers: \[1, 2, 3\] of 5",
        ),
        ("annotations", 0, {"bbox": ...}, "'bbox' that is not four numbers: None of 5"),
        ("annotations", 0, {"area": "9"}, "'area' that is not a number: '9' of 5"),
        ("annotations", 0, {"area": -1}, "1 of 3 areas are negative or NaN: annotation 5"),
        (
            "annotations",
            0,
            {"bbox": [1, 2, float("nan"), 3]},
            "1 of 3 boxes hold NaN or infinity: a",
        ),
        ("annotations", 0, {"bbox": [1, 2, 1e999, 3]}, "boxes hold NaN or infinity: annotation 5;"),
        ("annotations", 0, {"bbox": [9, 9, -4, 3]}, "1 of 3 boxes have a negative size: annotatio"),
        (
            "annotations",
            0,
            {"bbox": [32, 9, 4, 3]},
            "1 of 3 boxes lie outside of their pictures: a",
        ),
        (
            "annotations",
            0,
            {"bbox": [-4, 9, 4, 3]},
            "boxes lie outside of their pictures: annotati",
        ),
        (
            "annotations",
            0,
            {"bbox": [3, 25, 0, 0]},
            "boxes lie outside of their pictures: annotati",
        ),
        (
            "images",
            2,
            {"file_name": "gone.png"},
            r"1 of 3 pictures are missing: '.*gone\.png'; add",
        ),
    ],
)
def test_bad_entries_are_named(tmp_path, part, place, columns, message):
    write(tmp_path, changed(part, place, **columns))
    with pytest.raises(ValueError, match=f"coco_detection: .*{message}"):
        read(tmp_path)


def test_all_missing_pictures_are_counted_and_the_first_named(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["images"] += [
        {"id": 100 + i, "file_name": f"{i}.jpg", "height": 5, "width": 5} for i in range(7)
    ]
    write(tmp_path, content)
    with pytest.raises(
        ValueError, match=r"7 of 10 pictures are missing: '.*0\.jpg'.*4\.jpg', \.\.\.;"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"instances.json' is not JSON: Expecting value"),
        ("[" * 100_000, r"instances.json' is not JSON: "),
        (
            "[]",
            "is no instances file: it needs a list of objects named 'images' and 'categories' an",
        ),
        ('{"images": [1], "categories": [], "annotations": []}', "objects named 'images'"),
        ('{"images": [], "categories": [], "annotations": []}', "objects named 'images'"),
        ('{"images": [{"id": 1}], "categories": []}', "objects named 'annotations'"),
    ],
)
def test_files_that_are_no_instances_are_named(tmp_path, text, message):
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(ValueError, match=f"coco_detection: .*{message}"):
        read(tmp_path)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(ValueError, match=r"instances.json' cannot be read: No such file"):
        read(tmp_path)
