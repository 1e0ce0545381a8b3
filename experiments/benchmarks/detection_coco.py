"""COCO's evaluation of boxes against pycocotools: the same scenes, the same figures.

Aim       5,000 images with 50 detections each, of 80 classes, at 5 times the speed or more
Measured  `DetectionEvaluator.coco` against `COCOeval.evaluate`, `accumulate` and
          `summarize`, from what each keeps in memory; with "and reading" from arrays of
          every image (ours: `add_image`, `add_detections`; theirs: a list of dictionaries
          and `loadRes`). The largest difference of the figures is printed first.
Run       python experiments/benchmarks/detection_coco.py     (about 10 min on 2 CPU cores)
          python experiments/benchmarks/detection_coco.py --images 500 --rounds 5
"""

import contextlib
import dataclasses
import io
from typing import NamedTuple

import numpy as np
import tyro
from _timing import Contest, print_ratios


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      images: of the largest case; the others have a fifth and a tenth.
      rounds: turns of each contender in a case.
    """

    images: int = 5000
    rounds: int = 2


class Case(NamedTuple):
    images: int
    detections: int
    classes: int
    reading: bool = False


def scenes(case: Case):
    """Per image: true boxes, labels, crowds; found boxes, scores, labels."""
    rng = np.random.default_rng(0)
    for _ in range(case.images):
        n, m = int(rng.integers(15)), case.detections
        boxes, found = random_boxes(rng, n), random_boxes(rng, m)
        labels, guesses = rng.integers(case.classes, size=n), rng.integers(case.classes, size=m)
        # Two detections near every object, the others anywhere.
        near = np.arange(min(2 * n, m))
        of = near % max(n, 1)
        size = boxes[of, 2:] - boxes[of, :2]
        found[near] = boxes[of] + rng.normal(0, 0.1, (len(near), 4)) * np.tile(size, 2)
        found[:, 2:] = np.maximum(found[:, :2], found[:, 2:])
        guesses[near] = labels[of]
        yield boxes, labels, rng.random(n) < 0.02, found, rng.random(m), guesses


def random_boxes(rng, count):
    low, size = rng.uniform(0, 400, (count, 2)), np.exp(rng.uniform(2, 6, (count, 2)))
    return np.concatenate([low, low + size], axis=1)


def jaxmodels(case: Case):
    from jaxmodels.metrics import DetectionEvaluator

    drawn = list(scenes(case))

    def read():
        evaluator = DetectionEvaluator(case.classes)
        for image_id, (boxes, labels, crowds, found, scores, guesses) in enumerate(drawn):
            evaluator.add_image(image_id, boxes, labels, ignored=crowds)
            evaluator.add_detections(image_id, found, scores, guesses)
        return evaluator

    if case.reading:
        return lambda: list(read().coco().figures().values())
    evaluator = read()
    return lambda: list(evaluator.coco().figures().values())


def pycocotools(case: Case):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    drawn = list(scenes(case))

    def read():
        true, found = [], []
        for image_id, (boxes, labels, crowds, its, scores, guesses) in enumerate(drawn):
            true += rows(image_id, boxes, labels, iscrowd=crowds, area=areas(boxes))
            found += rows(image_id, its, guesses, score=scores)
        for number, row in enumerate(true, start=1):
            row["id"] = number
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(case.images)],
            "categories": [{"id": i} for i in range(case.classes)],
            "annotations": true,
        }
        truth.createIndex()
        return truth, truth.loadRes(found)

    def judge(truth, found):
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        return judge.stats.tolist()

    def quietly(call):
        def run():
            with contextlib.redirect_stdout(io.StringIO()):
                return call()

        return run

    if case.reading:
        return quietly(lambda: judge(*read()))
    tables = quietly(read)()
    return quietly(lambda: judge(*tables))


def areas(boxes):
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def rows(image_id, boxes, labels, **columns):
    sizes = boxes[:, 2:] - boxes[:, :2]
    columns |= {"bbox": np.concatenate([boxes[:, :2], sizes], axis=1), "category_id": labels}
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"image_id": image_id, **dict(zip(columns, row, strict=True))} for row in values]


def main(config: Config) -> None:
    few, fewer = config.images // 5, config.images // 10
    cases = {
        f"{few:,} x 50, 80 classes": Case(few, 50, 80),
        f"{few:,} x 50, 80 classes, and reading": Case(few, 50, 80, reading=True),
        f"{fewer:,} x 100, one class": Case(fewer, 100, 1),
        f"{config.images:,} x 50, 80 classes": Case(config.images, 50, 80),
    }
    small = Case(fewer, 50, 80)
    ours, theirs = (np.array(make(small)()) for make in (jaxmodels, pycocotools))
    print(f"largest difference of the twelve figures: {np.abs(ours - theirs).max():.1e}")
    results = {}
    with Contest({"jaxmodels": jaxmodels, "pycocotools": pycocotools}) as contest:
        for name, case in cases.items():
            results[name] = contest.compare(case, rounds=config.rounds)
            print(f"done: {name}", flush=True)
    print_ratios("COCO evaluation, images x detections", results, ours="jaxmodels")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
