"""A directory of class folders of JPEG and PNG files as a data set."""

import dataclasses
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxmodels.data.image_dataset import ImageDataset
from jaxmodels.data.jpeg import decode_jpeg_into

_SUFFIXES = (".jpg", ".jpeg", ".png")
_NAMED = 5


def image_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int,
    channels: int = 3,
    strict: bool = False,
    cache: bool = True,
    flip: bool = True,
) -> ImageDataset:
    """Reads `path/<class>/**/*.{jpg,jpeg,png}`; the sorted folder names are the classes.

    A picture is turned upright by its EXIF tag, its shorter side is scaled to
    `image_size` with an antialiased bicubic filter, its centre is cut out, and
    its values lie in [-1, 1]. Transparency is dropped; 16-bit grey is rounded
    to 8 bits. Hidden files and files with other endings are ignored.

    Every file is decoded once here, in threads, because only decoding finds a
    truncated file. With `cache` the result is kept: uint8, N * image_size^2 *
    channels bytes, and as much again in every worker process that `batches` is
    asked for, though a cached data set hardly needs any. Without it only the
    paths are kept and a picture is decoded whenever it is read. A file that has
    disappeared or been cut since is an OSError that names it with `strict`; otherwise
    the next picture of the data set that can be read comes in its place, with its own
    label, and a warning counts such files whenever their number has doubled.

    Args:
      path: the directory that holds one folder per class.
      image_size: rows and columns of the square pictures.
      channels: 3 for colour, 1 for grey.
      strict: a file that cannot be decoded, now or when it is read, is an error;
        otherwise it is skipped, and one `UserWarning` counts such files and names
        the first.
      cache: keep the decoded pictures in memory.
      flip: let `batches` mirror each picture left to right with probability 1/2.

    Returns:
      Pictures of shape (image_size, image_size, channels), ordered by path.

    Raises:
      ValueError: no such directory, no class folders, a class without a readable
        picture, a broken file with `strict`, or an impossible size.
    """
    if image_size < 1:
        raise ValueError(f"image_folder: image_size={image_size} is not positive; pass at least 1")
    if channels not in (1, 3):
        raise ValueError(f"image_folder: channels={channels}; pass 3 for colour or 1 for grey")
    root = Path(path)
    class_names = _class_names(root)
    found = [
        (file, label) for label, name in enumerate(class_names) for file in _pictures(root / name)
    ]
    paths = tuple(str(file) for file, _ in found)
    files = PictureFiles(paths, image_size, channels, strict)
    labels = np.array([label for _, label in found], np.int32)
    decoded, faults = _decode_all(files, keep=cache)
    pixels = files if decoded is None else decoded
    if any(faults):
        _report(root, dict(zip(files.paths, faults, strict=True)), strict=strict)
        good = np.flatnonzero([fault is None for fault in faults])
        pixels, labels = pixels[good], labels[good]
    _require_every_class(root, class_names, labels)
    return ImageDataset(pixels=pixels, labels=labels, class_names=class_names, flip=flip)


@dataclasses.dataclass(frozen=True)
class PictureFiles:
    """Files that behave as the array of their pictures: indexing selects, `np.asarray` decodes.

    Attributes:
      paths: of the files.
      image_size, channels: of the pictures.
      strict: whether `read` raises for a file that cannot be read any more.
      lost: what has become of files since, by path; one dictionary for all selections.
    """

    paths: tuple[str, ...]
    image_size: int
    channels: int
    strict: bool = True
    lost: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, Y, X, C, as if decoded."""
        return (len(self.paths), self.image_size, self.image_size, self.channels)

    def __getitem__(self, indices: Int[np.ndarray, "B"]) -> "PictureFiles":
        return dataclasses.replace(self, paths=tuple(self.paths[index] for index in indices))

    def __array__(
        self, dtype: Any = None, copy: bool | None = None
    ) -> UInt8[np.ndarray, "N Y X C"]:
        pixels = np.empty(self.shape, np.uint8)
        for path, picture in zip(self.paths, pixels, strict=True):
            self.decode(path, picture)
        return pixels

    def read(
        self, indices: Int[np.ndarray, "B"], mirrored: Bool[np.ndarray, "B"]
    ) -> tuple[UInt8[np.ndarray, "B Y X C"], Int[np.ndarray, "B"]]:
        """Decodes those at `indices`, or the next ones where files cannot be read any more.

        Mirroring here, before pixels are laid out in threes, takes a sixth of the time.
        Which ones is decided by the files alone, so a run that is resumed reads the same.

        Returns:
          The pictures, and the indices of what they show.

        Raises:
          OSError: with `strict`, names the file; without, no file at all can be read.
        """
        pixels = np.empty((len(indices), *self.shape[1:]), np.uint8)
        shown = np.array(indices)
        for place, (index, flip) in enumerate(zip(indices, mirrored, strict=True)):
            shown[place] = self._decode_into(pixels[place], int(index), bool(flip))
        return pixels, shown

    def _decode_into(self, picture: UInt8[np.ndarray, "Y X C"], index: int, mirrored: bool) -> int:
        for place in range(index, index + len(self.paths)):
            path = self.paths[place % len(self.paths)]
            try:
                self.decode(path, picture, mirrored=mirrored)
            # Pillow promises no one exception, and whatever a decoder raises is the file's fault.
            except Exception as error:
                self._lose(path, _reason(error), error)
            else:
                return place % len(self.paths)
        raise OSError(
            f"image_folder: none of {len(self.paths)} pictures can be read any more, such as "
            f"{self.paths[index]!r} ({self.lost[self.paths[index]]}); is their disk still there?"
        )

    def _lose(self, path: str, reason: str, error: Exception) -> None:
        if self.strict:
            raise OSError(
                f"image_folder: {path!r} cannot be read any more ({reason}); restore it, or go on "
                "without it by strict=False"
            ) from error
        if path in self.lost:
            return
        self.lost[path] = reason
        # Each doubling is said, so that a run that loses many says so in few lines.
        if (count := len(self.lost)).bit_count() == 1:
            warnings.warn(
                f"image_folder: {count} picture(s) cannot be read any more and others are read in "
                f"their place, the last one {path!r} ({reason})",
                stacklevel=2,
            )

    def decode(
        self, path: str, picture: UInt8[np.ndarray, "Y X C"], *, mirrored: bool = False
    ) -> None:
        """Reads one file from disk into `picture`; raises whatever Pillow does for a broken one."""
        data = Path(path).read_bytes()
        if self.channels == 3 and decode_jpeg_into(data, picture):
            # Three channels in turn take a ninth of the time of all at once.
            for channel in range(3) if mirrored else ():
                picture[..., channel] = picture[:, ::-1, channel]
            return
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            ImageOps.exif_transpose(image, in_place=True)
            found = _eight_bits(image)
        # Each of these would copy the picture even where there is nothing to do.
        if found.mode != (mode := "RGB" if self.channels == 3 else "L"):
            found = found.convert(mode)
        if found.size != (size := (self.image_size, self.image_size)):
            found = ImageOps.fit(found, size, Image.Resampling.BICUBIC)
        if mirrored:
            found = found.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture[...] = np.asarray(found).reshape(picture.shape)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Undoes what `convert` gets wrong: it clips 16-bit grey and warns of palettes with alpha."""
    if image.mode.startswith("I"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("RGBA") if "transparency" in image.info else image


def _class_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise ValueError(
            f"image_folder: path {str(root)!r} {state}; pass a directory of class folders"
        )
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(
            f"image_folder: path {str(root)!r} holds no class folders; put the pictures of each "
            f"class into a folder of its own, as in {str(root / 'cats' / '1.jpg')!r}"
        )
    return tuple(names)


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def _decode_all(
    files: PictureFiles, *, keep: bool
) -> tuple[UInt8[np.ndarray, "N Y X C"] | None, list[str | None]]:
    """Decodes every file once; what is wrong with each, or None, and the pixels if kept."""
    pixels = np.empty(files.shape, np.uint8) if keep else None

    def fault(index: int) -> str | None:
        picture = np.empty(files.shape[1:], np.uint8) if pixels is None else pixels[index]
        try:
            files.decode(files.paths[index], picture)
        # Pillow promises no one exception, and whatever a decoder raises is the file's fault.
        except Exception as error:
            return _reason(error)
        return None

    with ThreadPoolExecutor() as pool:
        return pixels, list(pool.map(fault, range(len(files.paths))))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG or PNG file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _report(root: Path, faults: dict[str, str | None], *, strict: bool) -> None:
    bad = [f"{path} ({fault})" for path, fault in faults.items() if fault is not None]
    named = "; ".join(bad[:_NAMED]) + ("; ..." if len(bad) > _NAMED else "")
    count = f"{len(bad)} of {len(faults)} pictures in {str(root)!r} cannot be decoded"
    if strict:
        raise ValueError(
            f"image_folder: {count}: {named}. Repair or remove them, or pass strict=False"
        )
    warnings.warn(f"image_folder: skipped {count}: {named}", stacklevel=3)


def _require_every_class(
    root: Path, class_names: tuple[str, ...], labels: Shaped[np.ndarray, "N"]
) -> None:
    empty = [name for label, name in enumerate(class_names) if label not in labels]
    if empty:
        raise ValueError(
            f"image_folder: no readable {', '.join(_SUFFIXES)} files in class folder(s) "
            f"{', '.join(map(repr, empty[:_NAMED]))} of path {str(root)!r}; add pictures or "
            "remove the folder(s)"
        )
