"""A stream of batches whose position can be saved, and in which batches can be passed over."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxmodels.training import processes

# Key under which the positions stand of processes that have different ones.
_BY_PROCESS = "by_process"


class Reader:
    """Counts the batches that it draws, so that one of them can be named.

    Args:
      batches: has `get_state` and `set_state`.

    Raises:
      ValueError: it has not.
    """

    def __init__(self, batches: Iterator[Any]):
        if not (hasattr(batches, "get_state") and hasattr(batches, "set_state")):
            raise ValueError(
                f"fit: batches is a {type(batches).__name__} without get_state and set_state, so "
                "its position could not be resumed; use jaxmodels.data.batches or a Grain iterator"
            )
        self._batches = batches
        self._avoided: set[int] = set()
        self.drawn = 0

    def next(self, done: int, steps: int) -> Any:
        """The next batch that is not to be passed over.

        Raises:
          ValueError: there is none.
        """
        while True:
            try:
                batch = next(self._batches)
            except StopIteration:
                raise ValueError(
                    f"fit: batches ended after step {done} of {steps}; let them repeat "
                    "(num_epochs=None) or ask for fewer steps"
                ) from None
            self.drawn += 1
            if self.drawn not in self._avoided:
                return batch

    def avoid(self, number: int) -> None:
        """Passes over the batch that was drawn as that number, when it comes again."""
        self._avoided.add(number)

    def facts(self) -> dict[str, Any]:
        """The position, as JSON; every process calls it."""
        positions = processes.gather(self._batches.get_state())
        same = all(position == positions[0] for position in positions)
        data = positions[0] if same else {_BY_PROCESS: positions}
        return {"data": data, "drawn": self.drawn}

    def go_to(self, facts: Mapping[str, Any], done: int) -> None:
        """Goes to a saved position; what this process passes over stays so.

        Another process would find the same batch at fault, and pass over it again.

        Args:
          facts: from `facts`.
          done: steps done then.

        Raises:
          ValueError: positions were saved of another number of processes.
        """
        data = facts["data"]
        if isinstance(data, Mapping) and set(data) == {_BY_PROCESS}:
            positions, count = data[_BY_PROCESS], len(processes.gather(None))
            if len(positions) != count:
                raise ValueError(
                    f"fit: each of {len(positions)} processes was at its own place in the data, "
                    f"but there are {count} now; start as many, or use data.batches, whose "
                    "position all processes share"
                )
            data = positions[processes.index()]
        self._batches.set_state(data)
        self.drawn = facts.get("drawn", done)
