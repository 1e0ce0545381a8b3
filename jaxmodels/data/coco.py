"""COCO's instances JSON and a folder of images as a data set with boxes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from jaxmodels.data.detection_dataset import BoxTable, DetectionDataset, make_dataset, refuse
from jaxmodels.data.resizing import SHORTEST_800, FixedSize, ShortestSide

_NAME = "coco_detection"
_PARTS = ("images", "categories", "annotations")
_LARGEST_ID = 2**63 - 1

Rows = list[dict[str, Any]]


def coco_detection(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    train: bool = False,
    resize: ShortestSide | FixedSize = SHORTEST_800,
    flip: bool = False,
    max_boxes: int | None = None,
    channels: int = 3,
) -> DetectionDataset:
    """Reads an instances file of COCO, "instances_val2017.json" for instance, with its pictures.

    Labels are the places of the category ids in order. Crowds ("iscrowd") are ignored
    boxes; "area" is kept, as COCO's size groups go by it, and is that of the box where it
    is missing. Outlines are not read. Pictures without objects are kept. Boxes that reach
    over the edge of their picture are cut and counted in `boxes_clipped`.

    Args:
      annotations: the JSON file.
      images: the folder that its file names start from.
      train: True leaves out boxes without an area, which have no logarithm, and allows
        `flip` and a `max_boxes` that is too small. False keeps every box as it is.
      resize: how pictures are scaled, and to which static shapes padded.
      flip: let `batches` mirror each picture left to right with probability 1/2.
      max_boxes: places for boxes in every image; None means as many as the fullest image
        has. If some have more, training says so once, in a `UserWarning`, and counts them
        in `boxes_left_out` of the data set and of each batch.
      channels: 3 for colour, 1 for grey.

    Returns:
      A data set for `batches` and `evaluation_batches`, ordered by image id.

    Raises:
      ValueError: the file is no JSON or no instances file; entries without something;
        ids that are not integers or that come twice; annotations of unknown images or
        categories; boxes that are negative, not finite or wholly outside; missing files;
        more boxes than `max_boxes` in evaluation; or an impossible option.
    """
    pictures, categories, rows = _load(Path(annotations))
    image_ids, category_ids = (
        np.array([row["id"] for row in part], np.int64) for part in (pictures, categories)
    )
    # The order within a picture stays, because it breaks ties in evaluation.
    places = _places("image_id", rows, image_ids, "images")
    order = np.argsort(places, kind="stable")
    labels = _places("category_id", rows, category_ids, "categories")
    return make_dataset(
        _NAME,
        [Path(images, name) for name in _column("images", pictures, "file_name", _is_text, "text")],
        _table(places, labels, rows)[order],
        lambda place: f"annotation {rows[order[place]]['id']}",
        max_boxes=max_boxes,
        channels=channels,
        train=train,
        flip=flip,
        sizes=_sizes(pictures),
        image_ids=image_ids,
        class_names=tuple(_column("categories", categories, "name", _is_text, "text")),
        category_ids=tuple(category_ids.tolist()),
        resize=resize,
    )


def _table(places: Int64[np.ndarray, "M"], labels: Int64[np.ndarray, "M"], rows: Rows) -> BoxTable:
    boxes = np.array(_column("annotations", rows, "bbox", _is_box, "four numbers"), np.float64)
    boxes = boxes.reshape(-1, 4)
    areas = boxes[:, 2] * boxes[:, 3]
    measured = [{"area": area} | row for area, row in zip(areas.tolist(), rows, strict=True)]
    areas = np.array(_column("annotations", measured, "area", _is_number, "a number"), np.float64)
    crowds = np.array([bool(row.get("iscrowd", 0)) for row in rows], bool)
    boxes[:, 2:] += boxes[:, :2]
    return BoxTable(places, boxes, labels.astype(np.int32), crowds, areas)


def _load(file: Path) -> tuple[Rows, Rows, Rows]:
    """Images and categories by id, and annotations; ids are integers of their own."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{_NAME}: {str(file)!r} cannot be read: {error.strerror}") from error
    # What nests too deeply exhausts Python's stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_NAME}: {str(file)!r} is not JSON: {error}") from error
    parts = {part: content.get(part) if isinstance(content, dict) else None for part in _PARTS}
    lacking = [repr(part) for part, rows in parts.items() if not _is_table(rows)]
    if lacking or not parts["images"]:
        raise ValueError(
            f"{_NAME}: {str(file)!r} is no instances file: it needs a list of objects named "
            f"{' and '.join(lacking) or repr('images')}"
        )
    for part, rows in parts.items():
        ids, counts = np.unique(_column(part, rows, "id", _is_id, "integers"), return_counts=True)
        twice = list(map(str, ids[counts > 1].tolist()))
        refuse(_NAME, twice, len(rows), f"ids of {part} come twice", "give each an id of its own")
    images, categories, annotations = parts.values()
    return sorted(images, key=_id), sorted(categories, key=_id), annotations


def _places(key: str, rows: Rows, ids: Int64[np.ndarray, "N"], part: str) -> Int64[np.ndarray, "M"]:
    """Where the ids that annotations refer to stand in `ids`."""
    place_of = {id_: place for place, id_ in enumerate(ids.tolist())}
    wanted = _column("annotations", rows, key, _is_id, "an integer")
    dangling = [
        f"annotation {row['id']} ({id_})"
        for row, id_ in zip(rows, wanted, strict=True)
        if id_ not in place_of
    ]
    what = f"annotations have a {key} that is not among the {part}"
    refuse(_NAME, dangling, len(rows), what, "correct or remove them")
    return np.array([place_of[id_] for id_ in wanted], np.int64)


def _sizes(pictures: Rows) -> Int32[np.ndarray, "N 2"]:
    sides = [
        _column("images", pictures, side, _is_side, "a positive integer")
        for side in ("height", "width")
    ]
    return np.array(sides, np.int32).T


def _column(part: str, rows: Rows, key: str, fits: Callable[[Any], bool], wanted: str) -> list[Any]:
    """What all rows say about `key`, if it is there and as `wanted`."""
    wrong = [
        f"{row.get(key)!r} of {row.get('id', f'entry {place}')}"
        for place, row in enumerate(rows)
        if not fits(row.get(key))
    ]
    refuse(_NAME, wrong, len(rows), f"{part} have a {key!r} that is not {wanted}", "correct it")
    return [row[key] for row in rows]


def _id(row: dict[str, Any]) -> int:
    return row["id"]


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST_ID


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
