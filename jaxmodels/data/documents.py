"""Documents: read from files of text, split by file, and as tokens laid end to end."""

import dataclasses
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jaxmodels.data.tokenizers import Tokenizer

# Of eight files, one is held out; the same rule as that of `python_text`.
_PARTS = 8
_NAMED = 5


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDocuments:
    """Documents as tokens laid end to end; a random-access source for Grain.

    Attributes:
      tokens: of all documents.
      ends: where in `tokens` each document ends and the next one begins.
    """

    tokens: Int32[np.ndarray, "N"]
    ends: Int[np.ndarray, "M"]

    @classmethod
    def join(cls, documents: Iterable[Int[np.ndarray, "_"]]) -> "TokenDocuments":
        """Lays documents end to end."""
        parts = [np.asarray(document, np.int32) for document in documents]
        tokens = np.concatenate([np.empty(0, np.int32), *parts])
        return cls(tokens, np.cumsum([len(part) for part in parts], dtype=np.int64))

    @property
    def lengths(self) -> Int[np.ndarray, "M"]:
        """Tokens of each document."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Int32[np.ndarray, "_"]:
        if not 0 <= index < len(self):
            raise IndexError(f"TokenDocuments: no document {index} of {len(self)}")
        start = self.ends[index - 1] if index else 0
        return self.tokens[start : self.ends[index]]


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> TokenDocuments:
    """Turns texts into documents of tokens, each with the tokenizer's end token after it.

    Texts are read one by one, so that only the tokens are held.

    Args:
      texts: of the documents, `read_documents(...)` for instance.
      tokenizer: its `end_id` is appended where `encode` has not done so already.

    Returns:
      The documents, in order.
    """

    def encoded(text: str) -> Int[np.ndarray, "_"]:
        ids, end = tokenizer.encode(text), tokenizer.end_id
        closed = end is None or (len(ids) and ids[-1] == end)
        return ids if closed else np.append(ids, np.int32(end))

    return TokenDocuments.join(map(encoded, texts))


def read_documents(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: Literal["train", "test"] | None = None,
    field: str = "text",
    strict: bool = False,
) -> Iterator[str]:
    """Reads the documents of files and folders, one after the other.

    Each line of a `.jsonl` file is a document and each row of a `.parquet` file
    (read with pyarrow); any other file is one document, whatever its ending. Folders
    are read with all that is below them, in the order of their names, hidden files
    left out. Empty documents are passed over.

    Args:
      paths: a file, a folder, or several of them.
      split: None for all documents; "test" for about one in eight and "train" for
        the others, by a checksum of the file's name below the folder given (and of
        the row, for files of many documents), so that a part stays what it is
        wherever the folder lies and whatever is added to it.
      field: of a `.jsonl` or `.parquet` file, the one that holds the text.
      strict: a document that cannot be read (not UTF-8, not JSON, without the
        field) is an error; otherwise it is skipped, and one `UserWarning` counts
        such documents and names the first.

    Returns:
      An iterator of texts. Files are read as it goes on; a byte order mark is
      dropped and nothing else is changed.

    Raises:
      ValueError: no such path, an unknown split, a part or a folder without
        documents, or a document that cannot be read with `strict`.
      OSError: a file has disappeared or fails while it is read; names it.
    """
    if split not in (None, "train", "test"):
        raise ValueError(
            f"read_documents: unknown split {split!r}; pass 'train', 'test' or None for all"
        )
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [file for path in paths for file in _files(Path(path))]
    return _documents(files, split, field, strict)


class _Fault(NamedTuple):
    """What stands where a text cannot be read."""

    reason: str


def _documents(
    files: list[tuple[str, Path]], split: str | None, field: str, strict: bool
) -> Iterator[str]:
    faults, count = [], 0
    for name, file in files:
        read = _READERS.get(file.suffix.lower(), _read_whole)
        for row, text in _named(file, read(file, field)):
            if split is not None and split != _part(name + row):
                continue
            count += 1
            if isinstance(text, _Fault):
                faults.append(f"{name}{row} ({text.reason})")
                if strict:
                    raise ValueError(
                        f"read_documents: {faults[0]} cannot be read; repair or remove it, or "
                        "pass strict=False"
                    )
            elif text:
                yield text
    if count == len(faults):
        part = f"the {split!r} part of " if split else ""
        raise ValueError(
            f"read_documents: {part}{len(files)} file(s) holds no document"
            + (f" that can be read: {_first(faults)}" if faults else "; add files")
            + (", or read all with split=None" if split else "")
        )
    if faults:
        warnings.warn(
            f"read_documents: skipped {len(faults)} of {count} documents: {_first(faults)}",
            stacklevel=2,
        )


def _named(file: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows; what the system says of a file that fails need not name it, and this does."""
    try:
        yield from rows
    except OSError as error:
        raise OSError(
            f"read_documents: {str(file)!r} cannot be read any more ({error.strerror or error}); "
            "restore it and start again"
        ) from error


def _first(faults: list[str]) -> str:
    return "; ".join(faults[:_NAMED]) + ("; ..." if len(faults) > _NAMED else "")


def _part(name: str) -> str:
    return "train" if zlib.crc32(name.encode()) % _PARTS else "test"


def _files(path: Path) -> list[tuple[str, Path]]:
    """The files of a path, each with the name that decides its part."""
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise ValueError(f"read_documents: {str(path)!r} does not exist; pass a file or a folder")
    inside = ((file.relative_to(path), file) for file in path.rglob("*") if file.is_file())
    return sorted(
        (name.as_posix(), file)
        for name, file in inside
        if not any(part.startswith(".") for part in name.parts)
    )


def _decode(content: bytes) -> str | _Fault:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _Fault(f"not UTF-8: byte {error.start} is {content[error.start]:#04x}")


def _read_whole(file: Path, field: str) -> Iterator[tuple[str, str | _Fault]]:
    yield "", _decode(file.read_bytes())


def _read_lines(file: Path, field: str) -> Iterator[tuple[str, str | _Fault]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line := line.strip():
                text = _decode(line)
                yield f":{number}", text if isinstance(text, _Fault) else _from_json(text, field)


def _from_json(line: str, field: str) -> str | _Fault:
    try:
        record = json.loads(line)
    except ValueError as error:
        return _Fault(f"not JSON: {error}")
    if not isinstance(record, dict):
        return _Fault(f"a JSON {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        return _Fault(f"no field {field!r} among {', '.join(map(repr, record))}")
    if not isinstance(record[field], str):
        return _Fault(f"field {field!r} is a {type(record[field]).__name__}, not a string")
    return record[field]


def _read_parquet(file: Path, field: str) -> Iterator[tuple[str, str | _Fault]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"read_documents: {str(file)!r} needs the package pyarrow, which is not installed; "
            "pip install pyarrow, or pass .jsonl or text files"
        ) from error
    number = 0
    # All of its errors are ValueErrors or OSErrors, and what they say is about this file.
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                yield "", _Fault(f"no column {field!r} among {table.schema_arrow.names}")
                return
            for batch in table.iter_batches(columns=[field]):
                # As bytes, because one string that is not UTF-8 would fail the whole batch.
                for content in batch.column(0).cast("binary").to_pylist():
                    number += 1
                    yield f":{number}", _Fault("null") if content is None else _decode(content)
    except FileNotFoundError:
        raise  # it was there when files were listed
    except (ValueError, OSError, NotImplementedError) as error:
        yield f":{number + 1}", _Fault(" ".join(str(error).split()))


_READERS = {".jsonl": _read_lines, ".parquet": _read_parquet}
