"""A folder of images and a folder of masks as a data set for segmentation."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

_SUFFIXES = (".jpg", ".jpeg", ".png")
_NAMED = 5
_WHITE = 255


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationDataset:
    """Pictures with a class for each pixel; a data set for `batches`.

    Attributes:
      pixels: levels 0 to 255.
      masks: classes, or 255 where nothing is known.
      class_names: one name per class.
      flip: whether `batches` mirrors pictures and masks at random.
    """

    pixels: UInt8[np.ndarray, "N Y X C"]
    masks: UInt8[np.ndarray, "N Y X"]
    class_names: tuple[str, ...]
    flip: bool = False

    def __len__(self) -> int:
        return len(self.masks)

    def take(
        self, indices: Int[np.ndarray, "B"]
    ) -> tuple[Float32[np.ndarray, "B Y X C"], Int32[np.ndarray, "B Y X"]]:
        """Pictures in [-1, 1] and their masks, several at once."""
        images = self.pixels[indices].astype(np.float32) / (_WHITE / 2) - 1
        return images, self.masks[indices].astype(np.int32)

    def batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`{"image": (B, Y, X, C), "mask": (B, Y, X)}`, mirrored at random if `flip`."""
        images, masks = self.take(indices)
        if self.flip:
            mirrored = rng.random(len(images)) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
            masks[mirrored] = masks[mirrored, :, ::-1]
        return {"image": images, "mask": masks}


def segmentation_folder(
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
    ignore_label: int = 255,
    channels: int = 3,
    flip: bool = True,
) -> SegmentationDataset:
    """Reads `path/images/<name>.{jpg,jpeg,png}` with `path/masks/<name>.png`.

    A mask is a grey or palette PNG whose levels are the classes. Both are scaled
    to `image_size`, proportions not kept: pictures bilinearly with antialiasing,
    masks by the nearest pixel. All is decoded once and kept in memory.

    Args:
      path: the folder with `images` and `masks`; hidden files and files with
        other endings are ignored.
      image_size: rows and columns of the result.
      class_names: names of the classes 0, 1, ..., at most 255.
      ignore_label: the level of pixels that do not count; they become 255.
      channels: 3 for colour, 1 for grey.
      flip: let `batches` mirror each picture left to right with probability 1/2.

    Returns:
      Pictures and masks, ordered by name.

    Raises:
      ValueError: no such folders, a picture without a mask or a mask without a
        picture, one of another size, a level that is no class, a mask in colour,
        a file that cannot be decoded, or an impossible option.
    """
    _check_options(image_size, class_names, channels)
    root = Path(path)
    pictures, masks = (_by_stem(root / part) for part in ("images", "masks"))
    if alone := sorted(pictures.keys() ^ masks.keys()):
        raise ValueError(
            f"segmentation_folder: no pair of picture and mask in {str(root)!r} for "
            f"{', '.join(map(repr, alone[:_NAMED]))}; each needs one in images and one in masks"
        )
    names = sorted(pictures)
    pixels = np.empty((len(names), *image_size, channels), np.uint8)
    classes = np.empty((len(names), *image_size), np.uint8)
    for number, name in enumerate(names):
        image = _open(pictures[name]).convert("RGB" if channels == 3 else "L")
        mask = _mask(masks[name], image, len(class_names), ignore_label)
        size = image_size[::-1]
        scaled = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        pixels[number] = scaled.reshape(pixels.shape[1:])
        classes[number] = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
    return SegmentationDataset(pixels, classes, tuple(class_names), flip)


def _check_options(image_size, class_names, channels) -> None:
    if min(image_size) < 1:
        raise ValueError(f"segmentation_folder: image_size={image_size} is not positive")
    if not 1 <= len(class_names) <= 255:
        raise ValueError(
            f"segmentation_folder: {len(class_names)} class_names; give 1 to 255, as a mask has "
            "bytes and 255 means ignored"
        )
    if channels not in (1, 3):
        raise ValueError(
            f"segmentation_folder: channels={channels}; pass 3 for colour or 1 for grey"
        )


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(
            f"segmentation_folder: no folder {str(folder)!r}; pass one that holds images and masks"
        )
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(
            f"segmentation_folder: no {', '.join(_SUFFIXES)} files in {str(folder)!r}; add some"
        )
    by_stem = {file.stem: file for file in files}
    if len(by_stem) < len(files):
        raise ValueError(
            f"segmentation_folder: files in {str(folder)!r} differ only in their endings; keep one "
            "of each name"
        )
    return by_stem


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            image.load()
            return image
    # Pillow promises no one exception, and whatever a decoder raises is the file's fault.
    except Exception as error:
        raise ValueError(
            f"segmentation_folder: {str(file)!r} cannot be decoded: {error}; repair or remove it"
        ) from error


def _mask(file: Path, image: Image.Image, num_classes: int, ignore_label: int) -> Image.Image:
    mask = _open(file)
    if mask.mode not in ("L", "P", "1"):
        raise ValueError(
            f"segmentation_folder: mask {str(file)!r} has mode {mask.mode}; give a grey or palette "
            "PNG of bytes whose levels are classes"
        )
    if mask.size != image.size:
        raise ValueError(
            f"segmentation_folder: mask {str(file)!r} is {mask.height} x {mask.width} pixels, its "
            f"picture {image.height} x {image.width}; they must be of one size"
        )
    levels = np.asarray(mask).astype(np.int32)
    wrong = levels[(levels >= num_classes) & (levels != ignore_label)]
    if wrong.size:
        raise ValueError(
            f"segmentation_folder: mask {str(file)!r} holds label {wrong.max()}, which is neither "
            f"below the {num_classes} classes nor ignore_label={ignore_label}"
        )
    return Image.fromarray(np.where(levels == ignore_label, 255, levels).astype(np.uint8))
