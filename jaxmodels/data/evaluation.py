"""Every example of a data set once, in batches of static shape."""

import dataclasses
from collections.abc import Iterable

import grain
import numpy as np
from jaxtyping import Int

from jaxmodels.data.pipeline import Dataset


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterable[dict[str, np.ndarray]]:
    """Batches that hold every example exactly once, unlike `batches`, which drops a remainder.

    Examples of one group, which have one shape, come together. The last batch of each
    group is filled up by repeating its last example, so that there are no more shapes
    than groups and what is compiled for them serves to the end.

    Args:
      dataset: what a data set for `batches` is; what it draws at random is fixed.
      batch_size: at least 1.

    Returns:
      Batches with two more entries: "filler" (B,), True for the repeated examples, which
      do not count; and "image_id" (B,), places in the data set, unless it has its own.
      Two threads read ahead. Iterate as often as you like.

    Raises:
      ValueError: batch_size below 1, or a data set that is empty.
    """
    if batch_size < 1 or not len(dataset):
        raise ValueError(
            f"evaluation_batches: batch_size={batch_size} for {len(dataset)} examples; both must "
            "be at least 1"
        )
    groups = np.asarray(getattr(dataset, "groups", np.zeros(len(dataset), np.int32)))
    places = [
        members[start : start + batch_size]
        for members in (np.flatnonzero(groups == group) for group in np.unique(groups))
        for start in range(0, len(members), batch_size)
    ]
    read = _Read(dataset, places, batch_size)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    return grain.MapDataset.range(len(places)).map(read).to_iter_dataset(options)


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """Batch number -> batch."""

    dataset: Dataset
    places: list[Int[np.ndarray, "_"]]
    batch_size: int

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        places = self.places[number]
        indices = np.pad(places, (0, self.batch_size - len(places)), mode="edge")
        batch = self.dataset.batch(indices, np.random.default_rng(number))
        filler = np.arange(self.batch_size) >= len(places)
        return {"image_id": indices, **batch, "filler": filler}
