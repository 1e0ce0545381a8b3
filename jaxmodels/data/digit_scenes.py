"""Scenes of handwritten digits with masks and boxes, drawn by number."""

import dataclasses
from typing import Literal, SupportsIndex

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

from jaxmodels.data.digits import digits

# Levels of a digit of 8 x 8 pixels; above a quarter it is ink.
_SIDE, _WHITE, _INK = 8, 16, 0.25
_TRIES = 20
_CLUTTER = 3


@dataclasses.dataclass(frozen=True, eq=False)
class DigitScenes:
    """Digits placed on canvases; scene i is a function of the seed and i alone.

    Attributes:
      pixels, labels: the digits to choose from.
      size: how many scenes there are.
      canvas: rows and columns.
      count: fewest and most digits in a scene; one that finds no room is left out,
        but the first is always there.
      scale: smallest and largest factor, the same for both sides.
      max_overlap: share of a digit's box that may lie in the box of another.
      noise: standard deviation of what is added to all pixels.
      clutter: pieces of digits strewn over the background, which are no objects.
      seed: of the scenes.
    """

    pixels: UInt8[np.ndarray, "M 8 8"]
    labels: Int32[np.ndarray, "M"]
    size: int
    canvas: tuple[int, int]
    count: tuple[int, int]
    scale: tuple[float, float]
    max_overlap: float
    noise: float
    clutter: int
    seed: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels of digits; in a mask 0 is the background and digit d is d + 1."""
        return tuple("0123456789")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of every scene."""
        return (*self.canvas, 1)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Scene `index`, the keys of `batch` without their first dimension."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(int(index),)))
        image = np.zeros(self.canvas, np.float32)
        instances = np.zeros(self.canvas, np.int32)
        boxes = np.zeros((self.count[1], 4), np.float32)
        box_labels = np.full(self.count[1], -1, np.int32)
        for _ in range(self.clutter):
            self._strew(rng, image)
        placed = 0
        for _ in range(rng.integers(self.count[0], self.count[1] + 1)):
            which = rng.integers(len(self.labels))
            found = self._find_place(rng, self.pixels[which], boxes[:placed])
            if found is not None:
                boxes[placed], ink = found
                _paint(image, instances, boxes[placed], ink, placed + 1)
                box_labels[placed] = self.labels[which]
                placed += 1
        image = image * 2 - 1
        if self.noise:
            image += self.noise * rng.normal(size=self.canvas).astype(np.float32)
        mask = np.concatenate([[0], box_labels + 1]).astype(np.int32)[instances]
        scene = {
            "image": np.clip(image, -1, 1)[..., None],
            "mask": mask,
            "instances": instances,
            "boxes": boxes,
            "box_labels": box_labels,
        }
        return {**scene, "label": box_labels[0]} if self.count == (1, 1) else scene

    def batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Scenes, stacked; `rng` is not used.

        "image" (B, Y, X, 1) in [-1, 1]; "mask" (B, Y, X), 0 for background and d + 1
        for digit d; "boxes" (B, N, 4) around the ink and "box_labels" (B, N), -1
        where a scene has fewer; "instances" (B, Y, X), i + 1 where box i is seen;
        and "label" (B,) if there is exactly one digit in every scene.
        """
        scenes = [self[index] for index in indices]
        return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}

    def _find_place(self, rng, digit, others):
        """The box of the ink and the ink in it; None where no place was free."""
        for _ in range(_TRIES):
            ink = _scaled(digit, rng.uniform(*self.scale))
            rows, columns = ink.shape
            if rows > self.canvas[0] or columns > self.canvas[1]:
                continue
            top = rng.integers(self.canvas[0] - rows + 1)
            left = rng.integers(self.canvas[1] - columns + 1)
            box = np.array([left, top, left + columns, top + rows], np.float32)
            if _largest_overlap(box, others) <= self.max_overlap:
                return box, ink
        return None

    def _strew(self, rng, image) -> None:
        """A piece of some digit, too small to be one."""
        digit = self.pixels[rng.integers(len(self.labels))]
        y, x = rng.integers(_SIDE - _CLUTTER + 1, size=2)
        scale = rng.uniform(*self.scale)
        piece = digit[y : y + _CLUTTER, x : x + _CLUTTER] / np.float32(_WHITE)
        piece = _resized(piece, scale)[: image.shape[0], : image.shape[1]]
        top, left = (rng.integers(n - m + 1) for n, m in zip(image.shape, piece.shape, strict=True))
        part = image[top : top + piece.shape[0], left : left + piece.shape[1]]
        np.maximum(part, piece, out=part)


def digit_scenes(
    split: Literal["train", "test"],
    *,
    size: int,
    canvas: tuple[int, int] = (64, 64),
    count: tuple[int, int] = (1, 5),
    scale: tuple[float, float] = (1.0, 6.0),
    max_overlap: float = 0.3,
    noise: float = 0.0,
    clutter: int = 0,
    seed: int = 0,
) -> DigitScenes:
    """Scenes of scikit-learn's digits; no digit of the test split is in a training scene.

    A digit is scaled bilinearly and cut to its ink, the pixels above a quarter
    of white, which its box touches on all sides. Later digits cover earlier ones.

    Args:
      split: `"train"` or `"test"`; scenes of both differ for the same seed.
      size: number of scenes.
      canvas: rows and columns.
      count: fewest and most digits; `(1, 1)` gives scenes with a "label".
      scale: smallest and largest factor for the 8 x 8 digits.
      max_overlap: from 0, none, to 1; share of a new digit's box, or of the
        other's, that both share.
      noise: standard deviation, in the image's unit (black is -1, white 1).
      clutter: number of distracting pieces.
      seed: of the scenes.

    Returns:
      A random-access data set for `batches`.

    Raises:
      ValueError: unknown split, or a number out of its range; digits at the
        smallest scale must fit the canvas.
    """
    limits = (
        (split in ("train", "test"), f"unknown split {split!r}; pass 'train' or 'test'"),
        (size >= 1, f"size={size} must be at least 1"),
        (1 <= count[0] <= count[1], f"count={count} must be two numbers in order, from 1"),
        (0 < scale[0] <= scale[1], f"scale={scale} must be two numbers in order, above 0"),
        (
            min(canvas) >= _SIDE * scale[0],
            f"canvas={canvas} is smaller than a digit at scale {scale[0]:g}, {_SIDE * scale[0]:g}",
        ),
        (0 <= max_overlap <= 1, f"max_overlap={max_overlap} is outside [0, 1]"),
        (noise >= 0 and clutter >= 0, f"noise={noise} and clutter={clutter} must not be negative"),
        (seed >= 0, f"seed={seed} must not be negative"),
    )
    for good, message in limits:
        if not good:
            raise ValueError(f"digit_scenes: {message}")
    source = digits(split)
    pixels = np.asarray(source.pixels)[..., 0]
    # The splits draw from streams of their own.
    seed = 2 * seed + (split == "test")
    return DigitScenes(
        pixels, source.labels, size, canvas, count, scale, max_overlap, noise, clutter, seed
    )


def _resized(picture: Float32[np.ndarray, "h w"], scale: float) -> Float32[np.ndarray, "Y X"]:
    rows, columns = (max(1, round(n * scale)) for n in picture.shape)
    image = Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _scaled(digit: UInt8[np.ndarray, "8 8"], scale: float) -> Float32[np.ndarray, "Y X"]:
    """The digit in [0, 1], cut to its ink."""
    picture = _resized(digit / np.float32(_WHITE), scale)
    ink = picture > _INK
    rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _largest_overlap(box, others) -> float:
    if not len(others):
        return 0.0
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    return float(np.max(shared / np.minimum(areas, np.prod(box[2:] - box[:2]))))


def _paint(image, instances, box, ink, number) -> None:
    left, top, right, bottom = box.astype(int)
    where = (slice(top, bottom), slice(left, right))
    covers = ink > _INK
    image[where] = np.where(covers, ink, np.maximum(image[where], ink))
    instances[where] = np.where(covers, number, instances[where])
