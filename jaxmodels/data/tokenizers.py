"""From text to the integers that language models read, and back."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Array, Int, Int32

# Tokens as a model gives them, or one by one.
Ids = Int[np.ndarray, "T"] | Int[Array, "T"] | Sequence[SupportsIndex]


@runtime_checkable
class Tokenizer(Protocol):
    """What reads and writes text for a language model.

    Attributes:
      vocab_size: ids are below it.
      begin_id, end_id: ids of the tokens around a document, or None where there are none.
    """

    vocab_size: int
    begin_id: int | None
    end_id: int | None

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """The ids of a text."""

    def decode(self, ids: Ids) -> str:
        """The text of ids, special tokens left out."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Text as its UTF-8 bytes: needs no file and knows every text.

    The bytes 248 to 255 never occur in UTF-8, so two of them stand for the special
    tokens and the vocabulary stays at 256, the default of our models.

    Attributes:
      vocab_size: ids are below it.
      begin_id, end_id: of the tokens around a document; `encode` adds neither.
    """

    vocab_size: int = dataclasses.field(default=256, init=False)
    begin_id: int = dataclasses.field(default=254, init=False)
    end_id: int = dataclasses.field(default=255, init=False)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """The bytes of a text, one id each."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """The text of ids without special tokens; what is not UTF-8 becomes U+FFFD.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        ids = _known(self, ids)
        text = ids[(ids != self.begin_id) & (ids != self.end_id)]
        return text.astype(np.uint8).tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer of the `tokenizers` library; made by `load_tokenizer`.

    Attributes:
      tokenizer: a `tokenizers.Tokenizer`.
      begin_id, end_id: of the tokens around a document, or None.
    """

    tokenizer: Any
    begin_id: int | None = None
    end_id: int | None = None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; ids may have gaps, so it is not their number."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """The ids of a text, with the special tokens that the file's template puts around it."""
        return np.array(self.tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """The text of ids, special tokens left out.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        return self.tokenizer.decode(_known(self, ids).tolist(), skip_special_tokens=True)


def load_tokenizer(path: str | os.PathLike[str]) -> FileTokenizer:
    """Reads a tokenizer in the format of Hugging Face's `tokenizers`.

    Args:
      path: a folder with `tokenizer.json` and perhaps `tokenizer_config.json`,
        whose `bos_token` and `eos_token` become `begin_id` and `end_id`; or such a
        `tokenizer.json` alone, which does not say which tokens these are.

    Returns:
      The tokenizer.

    Raises:
      ValueError: there is no such file, it is not of this format, the configuration
        names a token that the tokenizer lacks, or `tokenizers` is not installed.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        found = sorted(p.name for p in file.parent.glob("*"))[:8] if path.is_dir() else []
        raise ValueError(
            f"load_tokenizer: no file {str(file)!r}"
            + (f", only {', '.join(found)}" if found else "")
            + "; pass a tokenizer.json or its folder. Older formats become one by transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    tokenizer = _read(file)
    config = _read_config(path / "tokenizer_config.json") if path.is_dir() else {}
    begin, end = (_special_id(tokenizer, config, name, path) for name in ("bos_token", "eos_token"))
    return FileTokenizer(tokenizer, begin, end)


def _read(file: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "load_tokenizer: the package tokenizers is not installed; pip install tokenizers, or "
            "use ByteTokenizer()"
        ) from error
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    # The library raises a bare Exception for whatever it cannot parse.
    except Exception as error:
        raise ValueError(
            f"load_tokenizer: {str(file)!r} is not a tokenizer of the tokenizers library: {error}"
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_tokenizer: {str(file)!r} is not JSON: {error}") from error


def _special_id(tokenizer: Any, config: dict[str, Any], name: str, path: Path) -> int | None:
    token = config.get(name)
    token = token["content"] if isinstance(token, dict) else token
    if token is None:
        return None
    if (found := tokenizer.token_to_id(token)) is None:
        raise ValueError(
            f"load_tokenizer: {name} {token!r} of {str(path / 'tokenizer_config.json')!r} is not "
            "in tokenizer.json; the two belong to different models"
        )
    return found


def _known(tokenizer: Tokenizer, ids: Ids) -> Int[np.ndarray, "T"]:
    ids = np.asarray(ids, np.int64).reshape(-1)
    unknown = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if len(unknown):
        raise ValueError(
            f"{type(tokenizer).__name__}.decode: id {unknown[0]} is outside the vocabulary of "
            f"{tokenizer.vocab_size}; the tokens come from another tokenizer"
        )
    return ids
