"""Collects true and found boxes of a data set, image by image, and judges them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmodels.metrics.box_tables import Found, Objects
from jaxmodels.metrics.coco import CocoScores, coco_scores
from jaxmodels.metrics.voc import VocScores, voc_scores
from jaxmodels.ops.detections import Detections


class DetectionEvaluator:
    """Average precision of a detector on a data set, by the rules of COCO and of Pascal VOC.

    Everything happens on the host in float64, since the rules are full of sorting:

        evaluator = DetectionEvaluator(len(dataset.class_names))
        for batch in data.evaluation_batches(dataset, 8):
            found = detect(variables, batch["image"], batch.get("image_size"))
            evaluator.add_batch(found, batch)
        print(evaluator.coco().figures())

    Args:
      num_classes: K; labels are 0 to K - 1.

    Raises:
      ValueError: fewer than one class.
    """

    def __init__(self, num_classes: int):
        if num_classes < 1:
            raise ValueError(f"DetectionEvaluator: num_classes={num_classes}; give at least 1")
        self._num_classes = num_classes
        self._objects: dict[int, tuple[np.ndarray, ...]] = {}
        self._found: dict[int, tuple[np.ndarray, ...]] = {}

    def add_image(
        self,
        image_id: int | np.integer,
        boxes: Float[Array | np.ndarray, "N 4"],
        labels: Int[Array | np.ndarray, "N"],
        *,
        ignored: Bool[Array | np.ndarray, "N"] | None = None,
        areas: Float[Array | np.ndarray, "N"] | None = None,
    ) -> None:
        """Adds the truth about one image, which may hold nothing.

        Args:
          image_id: a number of its own; COCO breaks ties between images by it.
          boxes: xyxy. Where two boxes fit a detection equally well their order matters.
          labels: 0 to K - 1.
          ignored: crowds for COCO, difficult objects for VOC; None means none.
          areas: what COCO's size groups go by; None means those of the boxes.

        Raises:
          ValueError: an image that came before, arrays that disagree in length, a label
            out of range, or boxes or areas that are negative or not finite.
        """
        where = f"add_image: image {image_id}"
        if int(image_id) in self._objects:
            raise ValueError(f"{where} was added before; image ids must be unique")
        boxes, labels = self._checked(where, boxes, labels)
        ignored = np.zeros(len(boxes), bool) if ignored is None else np.asarray(ignored, bool)
        if areas is None:
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        areas = np.asarray(areas, np.float64)
        for name, values in (("ignored", ignored), ("areas", areas)):
            _require_length(where, name, values, len(boxes))
        if not np.all((areas >= 0) & (areas < np.inf)):
            raise ValueError(
                f"{where}: areas holds {_worst(areas)}; give finite ones, not negative"
            )
        self._objects[int(image_id)] = (labels, boxes, areas, ignored)

    def add_detections(
        self,
        image_id: int | np.integer,
        boxes: Float[Array | np.ndarray, "N 4"],
        scores: Float[Array | np.ndarray, "N"],
        labels: Int[Array | np.ndarray, "N"],
    ) -> None:
        """Adds all that was found in one image; one without detections needs no call.

        Args:
          image_id: of an image whose truth was added.
          boxes: xyxy, in the unit of the true ones.
          scores: falling or not; of equal ones the earlier is the better.
          labels: 0 to K - 1.

        Raises:
          ValueError: an unknown image, or one whose detections came before; arrays that
            disagree in length; a label out of range; boxes that are negative or not
            finite; or scores that are NaN.
        """
        where = f"add_detections: image {image_id}"
        if int(image_id) not in self._objects:
            raise ValueError(f"{where} is not in the ground truth; add it by add_image first")
        if int(image_id) in self._found:
            raise ValueError(f"{where} has detections already; add all of an image in one call")
        boxes, labels = self._checked(where, boxes, labels)
        scores = np.asarray(scores, np.float64)
        _require_length(where, "scores", scores, len(boxes))
        if np.isnan(scores).any():
            raise ValueError(
                f"{where}: {np.isnan(scores).sum()} scores are NaN; the model diverged"
            )
        self._found[int(image_id)] = (labels, boxes, scores)

    def add_batch(
        self, detections: Detections, batch: Mapping[str, Shaped[Array | np.ndarray, "..."]]
    ) -> None:
        """Adds the truth of a batch and what was found in it.

        Args:
          detections: of the batch's images, in pixels of these; invalid places are left out.
          batch: "boxes" and "box_labels", -1 where there is none. Optional are
            "box_ignored"; "area", in pixels of the original picture; "image_id", else
            images are numbered as they come; "scale" (B, 2) of rows and columns, by which
            all boxes are divided, so that sizes are those of the original pictures; and
            "filler" (B,), True for places that repeat an image only to fill the batch.

        Raises:
          ValueError: batches of different sizes; a batch whose "boxes_left_out" says that
            some objects did not fit; or as `add_image` and `add_detections`.
        """
        count = len(batch["boxes"])
        if len(detections.boxes) != count:
            raise ValueError(
                f"add_batch: detections of {len(detections.boxes)} images for a batch of {count}"
            )
        if np.any(batch.get("boxes_left_out", 0)):
            raise ValueError(
                "add_batch: the batch lacks boxes that did not fit its padding; evaluate a data "
                "set that was read with train=False"
            )
        detections = Detections(*map(np.asarray, detections))
        arrays = {name: np.asarray(values) for name, values in batch.items() if name in _USED}
        for i in range(count):
            one = {name: values[i] for name, values in arrays.items()}
            if not one.get("filler", False):
                self._add_one(Detections(*(part[i] for part in detections)), one)

    def coco(self) -> CocoScores:
        """COCO's scores of all that was added; detections beyond 100 are warned of.

        Raises:
          ValueError: nothing was added.
        """
        return coco_scores(*self._tables(), self._num_classes)

    def voc(self, *, threshold: float = 0.5) -> VocScores:
        """Pascal VOC's scores of all that was added.

        Args:
          threshold: overlap of a right detection.

        Raises:
          ValueError: nothing was added, or a threshold outside (0, 1].
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"voc: threshold={threshold} is outside (0, 1]")
        return voc_scores(*self._tables(), self._num_classes, threshold=threshold)

    def _add_one(self, found: Detections, image: Mapping[str, Any]) -> None:
        image_id = int(image.get("image_id", len(self._objects)))
        rows, columns = np.asarray(image.get("scale", (1.0, 1.0)), np.float64)
        scale = np.array([[columns, rows, columns, rows]])
        there, valid = image["box_labels"] >= 0, found.valid
        self.add_image(
            image_id,
            image["boxes"][there] / scale,
            image["box_labels"][there],
            ignored=image["box_ignored"][there] if "box_ignored" in image else None,
            areas=image["area"][there] if "area" in image else None,
        )
        self.add_detections(
            image_id, found.boxes[valid] / scale, found.scores[valid], found.classes[valid]
        )

    def _checked(self, where, boxes, labels):
        boxes, labels = np.asarray(boxes, np.float64), np.asarray(labels, np.int64)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{where}: boxes of shape {boxes.shape} must be (N, 4)")
        _require_length(where, "labels", labels, len(boxes))
        if not np.isfinite(boxes).all():
            raise ValueError(f"{where}: boxes hold NaN or infinity")
        backward = np.any(boxes[:, 2:] < boxes[:, :2], axis=1)
        if backward.any():
            raise ValueError(
                f"{where}: box {boxes[backward][0].tolist()} has a negative size; give xyxy, "
                "not xywh"
            )
        if np.any((labels < 0) | (labels >= self._num_classes)):
            wrong = labels[(labels < 0) | (labels >= self._num_classes)][0]
            raise ValueError(f"{where}: label {wrong} is outside [0, {self._num_classes - 1}]")
        return boxes, labels

    def _tables(self) -> tuple[Objects, Found]:
        if not self._objects:
            raise ValueError("DetectionEvaluator: no image was added, so there is nothing to judge")
        # Places in the order of the ids, by which COCO breaks ties of scores.
        places = {image_id: place for place, image_id in enumerate(sorted(self._objects))}
        objects, found = (_stacked(table, places) for table in (self._objects, self._found))
        if found is None:
            found = (np.zeros(0, np.int64),) * 2 + (np.zeros((0, 4)), np.zeros(0))
        return Objects.of(len(places), *objects), Found.of(len(places), *found)


_USED = {"boxes", "box_labels", "box_ignored", "area", "image_id", "scale", "filler"}


def _stacked(table, places):
    """The place of the image of every box, and the columns of all images; None if empty."""
    if not table:
        return None
    images = np.repeat(
        [places[image_id] for image_id in table], [len(row[0]) for row in table.values()]
    )
    return images, *map(np.concatenate, zip(*table.values(), strict=True))


def _require_length(where, name, values, length) -> None:
    if values.shape != (length,):
        raise ValueError(f"{where}: {name} of shape {values.shape} for {length} boxes")


def _worst(values):
    return values[~((values >= 0) & (values < np.inf))][0]
