"""CIFAR-10 and CIFAR-100 from their binary files."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from jaxmodels.data.image_dataset import ImageDataset

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
# Of each kind: files of the training set, those of the test set, and lists of names.
_CIFAR10 = ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"], "batches.meta.txt")
_CIFAR100 = (["train.bin"], ["test.bin"])


def cifar10(
    path: str | os.PathLike[str], split: Literal["train", "test"], *, flip: bool = False
) -> ImageDataset:
    """Reads the folder `cifar-10-batches-bin`: 32 x 32 colour pictures of ten classes.

    A record is a label byte and 3,072 bytes, red, green and blue plane by plane.
    Any number of records a file is read, so a part of the data set is one too.

    Args:
      path: the folder with `data_batch_1.bin` to `data_batch_5.bin`,
        `test_batch.bin` and, for the names of classes, `batches.meta.txt`.
      split: `"train"` or `"test"`.
      flip: let `batches` mirror each picture left to right with probability 1/2.

    Returns:
      Pictures of shape (32, 32, 3), in the order of the files.

    Raises:
      ValueError: unknown split, a missing file, a truncated one, or a label
        beyond the classes.

    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny
    Images"; the format is that of the binary version.
    """
    _check_split("cifar10", split)
    train, test, meta = _CIFAR10
    files = [Path(path) / name for name in (train if split == "train" else test)]
    names = _names(Path(path) / meta, 10)
    return _dataset("cifar10", files, 1, 0, names, flip)


def cifar100(
    path: str | os.PathLike[str],
    split: Literal["train", "test"],
    *,
    labels: Literal["fine", "coarse"] = "fine",
    flip: bool = False,
) -> ImageDataset:
    """Reads the folder `cifar-100-binary`: 100 classes in 20 groups.

    A record begins with two labels, coarse and fine; all else as `cifar10`.

    Args:
      path: the folder with `train.bin`, `test.bin` and, for the names of
        classes, `fine_label_names.txt` and `coarse_label_names.txt`.
      split: `"train"` or `"test"`.
      labels: `"fine"` (100 classes) or `"coarse"` (20).
      flip: let `batches` mirror each picture left to right with probability 1/2.

    Returns:
      Pictures of shape (32, 32, 3), in the order of the file.

    Raises:
      ValueError: as `cifar10`, or unknown labels.
    """
    _check_split("cifar100", split)
    if labels not in ("fine", "coarse"):
        raise ValueError(f"cifar100: unknown labels {labels!r}; pass 'fine' or 'coarse'")
    files = [Path(path) / name for name in _CIFAR100[split == "test"]]
    column, count = (1, 100) if labels == "fine" else (0, 20)
    names = _names(Path(path) / f"{labels}_label_names.txt", count)
    return _dataset("cifar100", files, 2, column, names, flip)


def _check_split(function: str, split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"{function}: unknown split {split!r}; pass 'train' or 'test'")


def _names(path: Path, count: int) -> tuple[str, ...]:
    """Numbers stand in for a list that is not there."""
    lines = path.read_text().split() if path.is_file() else []
    return tuple(lines) if len(lines) == count else tuple(map(str, range(count)))


def _dataset(function, files, label_bytes, column, names, flip) -> ImageDataset:
    records = np.concatenate([_records(function, file, label_bytes + _PIXELS) for file in files])
    labels = records[:, column].astype(np.int32)
    if labels.max() >= len(names):
        raise ValueError(
            f"{function}: {files[0].parent} holds label {labels.max()}, beyond the {len(names)} "
            "classes; is it the other CIFAR?"
        )
    planes = records[:, label_bytes:].reshape(-1, 3, _SIDE, _SIDE)
    pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return ImageDataset(pixels=pixels, labels=labels, class_names=names, flip=flip)


def _records(function: str, file: Path, size: int) -> np.ndarray:
    if not file.is_file():
        raise ValueError(
            f"{function}: no file {str(file)!r}; pass the folder of the binary version"
        )
    data = np.fromfile(file, np.uint8)
    whole, rest = divmod(len(data), size)
    if rest or not whole:
        raise ValueError(
            f"{function}: {str(file)!r} is truncated: found {len(data)} bytes, expected a multiple "
            f"of {size}, as {max(1, whole + bool(rest)) * size}; download it again"
        )
    return data.reshape(whole, size)
