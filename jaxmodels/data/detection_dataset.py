"""Pictures with boxes from files, resized together and padded to a few static shapes."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int32, Int64
from PIL import Image

from jaxmodels.data.resizing import FixedSize, ShortestSide

_NAMED = 5
_WHITE = 255


@dataclasses.dataclass(frozen=True, eq=False)
class BoxTable:
    """All boxes of a data set, ordered by picture.

    Attributes:
      pictures: place of the picture that each box is in.
      boxes: xyxy in pixels of the file; a box ends where its last pixel ends.
      labels: 0 to K - 1.
      ignored: crowds, difficult objects.
      areas: what COCO's size groups go by.
    """

    pictures: Int64[np.ndarray, "M"]
    boxes: Float64[np.ndarray, "M 4"]
    labels: Int32[np.ndarray, "M"]
    ignored: Bool[np.ndarray, "M"]
    areas: Float64[np.ndarray, "M"]

    def __getitem__(self, chosen) -> "BoxTable":
        return BoxTable(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class DetectionDataset:
    """Pictures with boxes; a data set for `batches` and `evaluation_batches`.

    Every picture has one of the few static shapes of `resize`. `batches` reads pictures
    of one shape together (`groups`), in an order that depends on the seed alone; so
    nothing recompiles, and in training on several hosts all have the same shape at the
    same step. Files are decoded when they are read.

    Attributes:
      paths: one file per picture.
      sizes: rows and columns of the files.
      image_ids: COCO's ids; for VOC, places in the list of pictures.
      table: all boxes; `starts` says where those of each picture begin.
      starts: N + 1 places.
      class_names: of the labels 0, 1, ...
      category_ids: what the labels are called in the annotations.
      resize: the rule.
      max_boxes: places for boxes in a batch.
      channels: 3 for colour, 1 for grey.
      train: whether it is for training; see `coco_detection`.
      flip: whether `batches` mirrors pictures and boxes at random.
      boxes_clipped: how many boxes reached over the edge of their picture and were cut.
      boxes_empty: how many boxes without an area were left out, in training only.
      boxes_left_out: how many do not fit into max_boxes, in training only.
    """

    paths: tuple[str, ...]
    sizes: Int32[np.ndarray, "N 2"]
    image_ids: Int64[np.ndarray, "N"]
    table: BoxTable
    starts: Int64[np.ndarray, "N_1"]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    resize: ShortestSide | FixedSize
    max_boxes: int
    channels: int
    train: bool
    flip: bool
    boxes_clipped: int
    boxes_empty: int
    boxes_left_out: int

    @property
    def groups(self) -> Int[np.ndarray, "N"]:
        """Which of `resize.shapes` each picture is padded to."""
        return self.resize.groups(self.sizes)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Pictures and their boxes, N = `max_boxes` places for each.

        "image" (B, Y, X, C) in [-1, 1], 0 where padded, below and on the right;
        "image_size" (B, 2), rows and columns without padding; "scale" (B, 2), by which
        rows and columns were multiplied; "image_id" (B,); "boxes" (B, N, 4) in pixels of
        the image; "box_labels" (B, N), -1 where a picture has fewer; "box_ignored"
        (B, N); "area" (B, N) in pixels of the file; and, where `max_boxes` cuts,
        "boxes_left_out" (B,).
        """
        files = self.sizes[indices]
        sizes, groups = self.resize.resized(files), self.resize.groups(files)
        rows, columns = np.max(np.array(self.resize.shapes)[groups], axis=0)
        mirrored = rng.random(len(indices)) < 0.5 * self.flip
        batch = self._boxes(indices, sizes, mirrored)
        images = np.zeros((len(indices), rows, columns, self.channels), np.float32)
        for image, index, size, mirror in zip(images, indices, sizes, mirrored, strict=True):
            image[: size[0], : size[1]] = self._picture(index, size)[:, :: -1 if mirror else 1]
        return {"image": images, **batch}

    def _boxes(self, indices, sizes, mirrored) -> dict[str, np.ndarray]:
        count, scale = len(indices), sizes / self.sizes[indices]
        batch = {
            "image_size": sizes,
            "scale": scale.astype(np.float32),
            "image_id": self.image_ids[indices],
            "boxes": np.zeros((count, self.max_boxes, 4), np.float32),
            "box_labels": np.full((count, self.max_boxes), -1, np.int32),
            "box_ignored": np.zeros((count, self.max_boxes), bool),
            "area": np.zeros((count, self.max_boxes)),
        }
        left_out = np.zeros(count, np.int32)
        for i, index in enumerate(indices):
            rows, left_out[i] = self._rows(index)
            boxes = rows.boxes * scale[i, [1, 0, 1, 0]][None]
            if mirrored[i]:
                # Rounding must not carry an edge of the picture below zero.
                boxes[:, [0, 2]] = np.maximum(sizes[i, 1] - boxes[:, [2, 0]], 0)
            filled = slice(len(boxes))
            batch["boxes"][i, filled] = boxes
            batch["box_labels"][i, filled] = rows.labels
            batch["box_ignored"][i, filled] = rows.ignored
            batch["area"][i, filled] = rows.areas
        return batch | ({"boxes_left_out": left_out} if self.boxes_left_out else {})

    def _rows(self, index) -> tuple[BoxTable, int]:
        """The boxes of a picture that fit, and how many do not."""
        rows = self.table[self.starts[index] : self.starts[index + 1]]
        left_out = len(rows.labels) - self.max_boxes
        if left_out <= 0:
            return rows, 0
        # Crowds go first, then the smallest; the order of the others is kept.
        kept = np.lexsort((-rows.areas, rows.ignored))[: self.max_boxes]
        return rows[np.sort(kept)], left_out

    def _picture(self, index, size) -> Float32[np.ndarray, "Y X C"]:
        path, (rows, columns) = self.paths[index], self.sizes[index]
        try:
            with Image.open(path, formats=("JPEG", "PNG")) as file:
                image = file.convert("RGB" if self.channels == 3 else "L")
        # Pillow promises no one exception, and whatever a decoder raises is the file's fault.
        except Exception as error:
            raise ValueError(
                f"DetectionDataset: {path!r} cannot be decoded: {error}; repair or remove it"
            ) from error
        if image.size != (columns, rows):
            raise ValueError(
                f"DetectionDataset: {path!r} is {image.height} x {image.width} pixels, its "
                f"annotation says {rows} x {columns}; boxes would be misplaced"
            )
        scaled = image.resize((int(size[1]), int(size[0])), Image.Resampling.BILINEAR)
        levels = np.array(scaled, np.float32).reshape(*size, self.channels)
        levels /= _WHITE / 2
        levels -= 1
        return levels


def make_dataset(
    function: str,
    paths: Sequence[Path],
    table: BoxTable,
    origin: Callable[[int], str],
    *,
    max_boxes: int | None,
    channels: int,
    train: bool,
    flip: bool,
    **columns,
) -> DetectionDataset:
    """What all readers do in the end: looks for the files, and checks, cuts and counts boxes.

    Args:
      function: the reader, for messages.
      paths: the pictures.
      table: boxes as they were written, ordered by picture.
      origin: place of a box in `table` to words that say where it was written.
      max_boxes, channels, train, flip: see `coco_detection`.
      columns: the other attributes of `DetectionDataset`.

    Raises:
      ValueError: see `coco_detection`.
    """
    _check_options(function, max_boxes, channels, train, flip)
    missing = [repr(str(path)) for path in paths if not path.is_file()]
    refuse(function, missing, len(paths), "pictures are missing", "add them, or correct the path")
    boxes, clipped = _checked_boxes(function, table, columns["sizes"][table.pictures], origin)
    table, empty = dataclasses.replace(table, boxes=boxes), 0
    if train:
        solid = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        table, empty = table[solid], int(np.sum(~solid))
    starts = np.searchsorted(table.pictures, np.arange(len(paths) + 1))
    counts = np.diff(starts)
    fullest = max(counts.max(initial=0), 1)
    places = int(fullest) if max_boxes is None else max_boxes
    left_out = int(np.maximum(counts - places, 0).sum())
    if left_out:
        _say_left_out(function, left_out, int(np.sum(counts > places)), places, fullest, train)
    return DetectionDataset(
        paths=tuple(map(str, paths)),
        table=table,
        starts=starts,
        max_boxes=places,
        channels=channels,
        train=train,
        flip=flip,
        boxes_clipped=clipped,
        boxes_empty=empty,
        boxes_left_out=left_out,
        **columns,
    )


def refuse(function: str, bad: Sequence[str], total: int, what: str, remedy: str) -> None:
    """Raises if something is bad: how many of how many, the first of them, what to do.

    Raises:
      ValueError: `bad` is not empty.
    """
    if bad:
        named = ", ".join(bad[:_NAMED]) + (", ..." if len(bad) > _NAMED else "")
        raise ValueError(f"{function}: {len(bad)} of {total} {what}: {named}; {remedy}")


def _check_options(function, max_boxes, channels, train, flip) -> None:
    if channels not in (1, 3):
        raise ValueError(f"{function}: channels={channels}; pass 3 for colour or 1 for grey")
    if max_boxes is not None and max_boxes < 1:
        raise ValueError(f"{function}: max_boxes={max_boxes}; pass at least 1, or None for all")
    if flip and not train:
        raise ValueError(f"{function}: flip=True mirrors at random; pass train=True with it")


def _checked_boxes(function, table, sizes, origin) -> tuple[Float64[np.ndarray, "M 4"], int]:
    """The boxes cut to their pictures, and how many had to be."""
    boxes, total = table.boxes, len(table.boxes)

    def refuse_boxes(bad, what, remedy):
        refuse(function, [origin(i) for i in np.flatnonzero(bad)], total, what, remedy)

    refuse_boxes(~np.isfinite(boxes).all(axis=1), "boxes hold NaN or infinity", "correct them")
    refuse_boxes(~(table.areas >= 0), "areas are negative or NaN", "correct them")
    backward = np.any(boxes[:, 2:] < boxes[:, :2], axis=1)
    refuse_boxes(backward, "boxes have a negative size", "correct them")
    limits = sizes[:, [1, 0, 1, 0]].astype(np.float64)
    inside = np.clip(boxes, 0, limits)
    # A box that loses all its width or height lies beyond an edge; one that had none may stay.
    gone = (inside[:, 2:] <= inside[:, :2]) & (boxes[:, 2:] > boxes[:, :2])
    apart = (boxes[:, 2:] < 0) | (boxes[:, :2] > limits[:, 2:])
    outside = np.any(gone | apart, axis=1)
    refuse_boxes(outside, "boxes lie outside of their pictures", "correct or remove them")
    return inside, int(np.any(inside != boxes, axis=1).sum())


def _say_left_out(function, left_out, pictures, places, fullest, train) -> None:
    said = (
        f"{function}: {left_out} boxes of {pictures} pictures do not fit into max_boxes={places}; "
        f"the fullest has {fullest}"
    )
    if not train:
        raise ValueError(f"{said}. Evaluation must see all; pass max_boxes=None")
    warnings.warn(f"{said}. Crowds are left out first, then the smallest", stacklevel=4)
