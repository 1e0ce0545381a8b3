"""Documents of any length as sequences of one length: several to a sequence, or padded.

A document of n tokens has n - 1 targets, each the token after one of the others,
and takes n - 1 places of a sequence. A longer one than the sequence is split into
pieces that share one token, so that every target still occurs exactly once.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from jaxmodels.data.documents import TokenDocuments


def first_fit_decreasing(sizes: Int[np.ndarray, "N"], capacity: int) -> Int[np.ndarray, "N"]:
    """Puts things into bins: the largest first, each into the first bin with room for it.

    At most 11/9 of the fewest bins that would do, and 6/9 of a bin. Things of equal
    size are placed together, since they fill the bins from the first one on, each
    with as many as it has room for: time is O(distinct sizes * open bins), in NumPy.

    Args:
      sizes: of the things, 1 to `capacity`.
      capacity: of each bin.

    Returns:
      The number of each thing's bin; bins are numbered from 0 in the order in which
      they were opened.

    Raises:
      ValueError: a size that is not positive or more than the capacity.

    Source: Johnson 1973, "Near-optimal bin packing algorithms"; the bound of Dosa
    2007, "The tight bound of first fit decreasing".
    """
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise ValueError(
            f"first_fit_decreasing: sizes from {sizes.min()} to {sizes.max()} must lie between 1 "
            f"and capacity={capacity}; split what is larger"
        )
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    values, counts = np.unique(sizes, return_counts=True)
    # The bins that may still take something, and how much.
    names, room = np.empty(0, np.int64), np.empty(0, np.int64)
    placed = opened = 0
    for size, count in zip(values[::-1], counts[::-1], strict=True):
        enough = -(-count // (capacity // size))
        names = np.append(names, opened + np.arange(enough))
        room = np.append(room, np.full(enough, capacity))
        able = np.flatnonzero(room >= size)
        fits = room[able] // size
        taken = np.clip(count - (np.cumsum(fits) - fits), 0, fits)
        room[able] -= taken * size
        chosen = np.repeat(names[able], taken)
        bins[order[placed : placed + count]] = chosen
        placed, opened = placed + count, max(opened, chosen[-1] + 1)
        keep = (names < opened) & (room >= values[0])
        names, room = names[keep], room[keep]
    return bins


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentRows:
    """Sequences of one length filled with pieces of documents; a data set for `batches`.

    Made by `pack_documents` and `pad_documents`.

    Attributes:
      documents: whose tokens the pieces are.
      length: T, of a sequence.
      starts, sizes: of the pieces in `documents.tokens`, sequence by sequence; a piece
        has `size` targets, the tokens after its `size` tokens.
      ends: where in `starts` the pieces of each sequence end.
    """

    documents: TokenDocuments
    length: int
    starts: Int[np.ndarray, "P"]
    sizes: Int[np.ndarray, "P"]
    ends: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def fill(self) -> float:
        """The share of places that hold a token."""
        return int(self.sizes.sum()) / max(1, len(self) * self.length)

    def batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The sequences at `indices`, each array (B, T).

        "tokens", "targets": int32, 0 where nothing is.
        "weights": float32, 1 where there is a target and 0 on padding.
        "segment_ids": int32, 1, 2 ... for the pieces of a sequence, 0 on padding.
        "positions": int32, from 0 in each piece, and on padding.
        """
        names = ("tokens", "targets", "segment_ids", "positions")
        shape = (len(indices), self.length)
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        for row, index in enumerate(np.asarray(indices)):
            self._fill({name: array[row] for name, array in batch.items()}, int(index))
        return batch

    def _fill(self, row: dict[str, np.ndarray], index: int) -> None:
        tokens, end = self.documents.tokens, 0
        first = self.ends[index - 1] if index else 0
        for number, piece in enumerate(range(first, self.ends[index]), 1):
            start, size = self.starts[piece], self.sizes[piece]
            place = slice(end, end := end + size)
            row["tokens"][place] = tokens[start : start + size]
            row["targets"][place] = tokens[start + 1 : start + size + 1]
            row["segment_ids"][place] = number
            row["positions"][place] = np.arange(size)
            row["weights"][place] = 1
        row["positions"][end:] = np.arange(self.length - end)


def pack_documents(
    documents: TokenDocuments, length: int, *, long: Literal["split", "refuse"] = "split"
) -> DocumentRows:
    """Packs documents into sequences, with hardly any padding, by `first_fit_decreasing`.

    Args:
      documents: those with fewer than two tokens have no target and are left out.
      length: T, of a sequence.
      long: what is done with documents of more than length + 1 tokens: "split" them
        into pieces, each of which becomes a document of its own that does not see
        the others, or "refuse" them.

    Returns:
      The sequences, in the order in which they were opened: those with the longest
      pieces come first, so shuffle them.

    Raises:
      ValueError: `length` is not positive, `long` is unknown or refuses a document,
        or no document has a target.

    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination"
    (arXiv:2107.02027), section 3, with first fit instead of their histograms.
    """
    starts, sizes = _pieces("pack_documents", documents, length, long)
    bins = first_fit_decreasing(sizes, length)
    order = np.argsort(bins, kind="stable")
    ends = np.cumsum(np.bincount(bins))
    return DocumentRows(documents, length, starts[order], sizes[order], ends)


def pad_documents(
    documents: TokenDocuments, length: int, *, long: Literal["split", "refuse"] = "split"
) -> DocumentRows:
    """Gives every document, or piece of one, a sequence of its own, padded at its end.

    What `pack_documents` is compared with; arguments, order of documents kept, and
    errors are as there.
    """
    starts, sizes = _pieces("pad_documents", documents, length, long)
    return DocumentRows(documents, length, starts, sizes, 1 + np.arange(len(starts)))


def _pieces(
    caller: str, documents: TokenDocuments, length: int, long: str
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Where in all tokens each piece starts, and how many targets it has."""
    if length < 1:
        raise ValueError(f"{caller}: length={length} must be positive")
    if long not in ("split", "refuse"):
        raise ValueError(f"{caller}: long={long!r} is neither 'split' nor 'refuse'")
    targets = np.maximum(documents.lengths - 1, 0)
    if long == "refuse" and (targets > length).any():
        first = int(np.argmax(targets > length))
        raise ValueError(
            f"{caller}: document {first} of {len(documents)} has {targets[first] + 1} tokens, more "
            f"than length + 1 = {length + 1}, and so have {(targets > length).sum() - 1} others; "
            f"pass length={targets.max()} or long='split'"
        )
    if not targets.any():
        raise ValueError(f"{caller}: none of {len(documents)} documents has two tokens or more")
    pieces = -(-targets // length)
    document = np.repeat(np.arange(len(documents)), pieces)
    # Which piece of its document each one is.
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (documents.ends - documents.lengths)[document] + number * length
    return starts, np.minimum(length, targets[document] - number * length)
