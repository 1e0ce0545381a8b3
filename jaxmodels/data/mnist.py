"""MNIST and its kin (Fashion-MNIST, KMNIST) from idx files."""

import gzip
import os
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from jaxmodels.data.image_dataset import ImageDataset

_PREFIX = {"train": "train", "test": "t10k"}
_BYTES = 0x08


def mnist(path: str | os.PathLike[str], split: Literal["train", "test"]) -> ImageDataset:
    """Reads `<split>-images-idx3-ubyte` and `<split>-labels-idx1-ubyte`, gzipped or not.

    Args:
      path: the folder with the files; the test set's begin with `t10k`. Names may
        end in `.gz`, and a dot may stand before `idx`.
      split: `"train"` or `"test"`.

    Returns:
      Grey pictures of shape (rows, columns, 1), 28 x 28 for MNIST; classes 0 to 9.

    Raises:
      ValueError: unknown split, a missing file, one that is no idx file of bytes
        or is truncated, or unequal numbers of pictures and labels.

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document
    Recognition"; the format is described on the data set's page.
    """
    if split not in _PREFIX:
        raise ValueError(f"mnist: unknown split {split!r}; pass 'train' or 'test'")
    pixels = _read(_find(Path(path), f"{_PREFIX[split]}-images", 3), 3)
    labels = _read(_find(Path(path), f"{_PREFIX[split]}-labels", 1), 1)
    if len(pixels) != len(labels):
        raise ValueError(
            f"mnist: {len(pixels)} pictures but {len(labels)} labels in {str(path)!r}; the files "
            "do not belong together"
        )
    classes = max(10, int(labels.max(initial=0)) + 1)
    return ImageDataset(
        pixels=pixels[..., None],
        labels=labels.astype(np.int32),
        class_names=tuple(map(str, range(classes))),
    )


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in ("-", ".") for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"mnist: {str(folder)!r} holds none of {', '.join(names)}")


def _read(file: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """An array of bytes: two zeros, the type, the number of dimensions, their sizes, the values."""
    data = _content(file)
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ValueError(_truncated(file, len(data), f"a header of {start}"))
    if data[:4] != bytes([0, 0, _BYTES, dimensions]):
        raise ValueError(
            f"mnist: {str(file)!r} begins with {data[:4].hex(' ')}, not 00 00 08 0{dimensions}, so "
            f"it is no idx file of bytes with {dimensions} dimension(s)"
        )
    shape = np.frombuffer(data, ">u4", dimensions, offset=4).astype(np.int64)
    expected = start + int(shape.prod())
    if len(data) != expected:
        raise ValueError(_truncated(file, len(data), f"{expected} for {shape.tolist()}"))
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    if file.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"mnist: {str(file)!r} ({len(data)} bytes) is no whole gzip file: {error}; download it "
            "again"
        ) from error


def _truncated(file: Path, found: int, expected: str) -> str:
    return (
        f"mnist: {str(file)!r} is truncated or too long: found {found} bytes, expected {expected}; "
        "download it again"
    )
