"""Text as bytes: the Python library's own source, and windows of any text."""

import dataclasses
import functools
import sysconfig
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

# Folders of the library that are not its source, or that systems leave out at will.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
# Of eight files, one is held out.
_PARTS = 8


@functools.cache
def python_text(split: Literal["train", "test"]) -> UInt8[np.ndarray, "N"]:
    """The standard library's source and the topics of its manual, split by file.

    About ten megabytes of real English and code that are there wherever Python
    is. A file belongs to one part by a checksum of its name, one in eight to the
    test part; files follow one another in the order of these checksums, each
    ending in a zero byte. Each topic of the manual (`pydoc_data`) counts as a file.

    Args:
      split: `"train"` or `"test"`.

    Returns:
      Bytes.

    Raises:
      ValueError: unknown split.
      OSError: this installation of Python comes without its source.
    """
    if split not in ("train", "test"):
        raise ValueError(f"python_text: unknown split {split!r}; pass 'train' or 'test'")
    chosen = [
        (checksum, content)
        for name, content in {**_source(), **_topics()}.items()
        if ((checksum := zlib.crc32(name.encode())) % _PARTS == 0) == (split == "test")
    ]
    if not chosen:
        raise OSError("python_text: this installation of Python comes without its source")
    text = b"".join(content + b"\0" for _, content in sorted(chosen))
    return np.frombuffer(text, np.uint8)


def _source() -> dict[str, bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if not _LEFT_OUT & {*path.parts} and path.name != "topics.py")
    return {path.as_posix(): (root / path).read_bytes() for path in kept}


def _topics() -> dict[str, bytes]:
    from pydoc_data.topics import topics

    return {f"pydoc_data/{name}": text.encode() for name, text in topics.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class ByteWindows:
    """Consecutive windows of a text; a data set for `batches`.

    Attributes:
      text: bytes.
      length: of a window.
    """

    text: UInt8[np.ndarray, "N"]
    length: int

    def __post_init__(self):
        if not 0 < self.length < len(self.text):
            raise ValueError(
                f"ByteWindows: length={self.length} must be positive and less than the text's "
                f"{len(self.text)} bytes"
            )

    def __len__(self) -> int:
        # A window's last target is the byte after it.
        return (len(self.text) - 1) // self.length

    def batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`{"tokens": (B, length), "targets": (B, length)}`, targets one byte ahead; int32."""
        places = np.asarray(indices)[:, None] * self.length + np.arange(self.length + 1)
        taken = self.text[places].astype(np.int32)
        return {"tokens": taken[:, :-1], "targets": taken[:, 1:]}
