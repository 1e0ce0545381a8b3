"""Packing of documents that come one by one and need never end, with a saved position."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import grain
import numpy as np

from jaxmodels.data.documents import TokenDocuments
from jaxmodels.data.packing import pack_documents


class PackedStream(grain.IterDataset):
    """Packs a stream of documents window by window; a transformation of Grain.

        documents = grain.MapDataset.source(tokenize(...)).shuffle(seed=0).repeat()
        stream = iter(PackedStream(documents.to_iter_dataset(), 1024).batch(8))

    `window` documents are read, packed by `pack_documents` and given in a fixed random
    order, then the next ones. So the position is that of the window's first document
    and a number of sequences: small, and exact. A window's last sequence is not
    full; the more documents, the less that matters.

    Args:
      parent: yields documents, arrays of tokens.
      length: T, of a sequence.
      window: documents that are packed together.
      long: as of `pack_documents`.

    Yields sequences as `DocumentRows.batch` has them, without the batch dimension;
    `.batch(B)` stacks them.

    Raises:
      ValueError: `window` is not positive; on reading, as `pack_documents`.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        length: int,
        *,
        window: int = 1024,
        long: Literal["split", "refuse"] = "split",
    ):
        if window < 1:
            raise ValueError(f"PackedStream: window={window} must be positive")
        super().__init__(parent)
        self._options = (length, window, long)

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self.parents[0]), *self._options)

    def __str__(self) -> str:
        return "PackedStream"


class _PackedIterator(grain.DatasetIterator):
    """Holds one window, packed; the position is where it began and how much of it was given."""

    def __init__(self, parent: grain.DatasetIterator, length: int, window: int, long: str):
        super().__init__(parent)
        self._length, self._window, self._long = length, window, long
        self._number, self._row = 0, 0
        # Where the window begins; a copy, since the parent may go on with its own.
        self._start = copy.deepcopy(parent.get_state())
        self._rows: dict[str, np.ndarray] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        if self._rows is None:
            self._rows = self._read()
        row = {name: array[self._row] for name, array in self._rows.items()}
        self._row += 1
        if self._row == len(self._rows["tokens"]):
            self._number, self._row = self._number + 1, 0
            self._start, self._rows = copy.deepcopy(self._parents[0].get_state()), None
        return row

    def _read(self) -> dict[str, np.ndarray]:
        # Documents without a target would be left out, and might be all of a window.
        useful = (document for document in self._parents[0] if len(document) > 1)
        documents = list(itertools.islice(useful, self._window))
        if not documents:
            raise StopIteration
        rows = pack_documents(TokenDocuments.join(documents), self._length, long=self._long)
        # First fit opens sequences in the order of their longest documents.
        rng = np.random.default_rng(self._number)
        return rows.batch(rng.permutation(len(rows)), rng)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._start, "window": self._number, "row": self._row}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"parent", "window", "row"}:
            raise ValueError(
                f"PackedStream: set_state got the keys {sorted(state)}, not 'parent', 'row' and "
                "'window'; pass what get_state returned"
            )
        self._start = state["parent"]
        self._number, self._row = int(state["window"]), int(state["row"])
        self._parents[0].set_state(copy.deepcopy(self._start))
        self._rows = None
