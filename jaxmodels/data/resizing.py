"""To which size a picture with boxes is scaled, and to which few shapes it is padded."""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class ShortestSide:
    """Keeps proportions: the shorter side becomes `shortest`, unless the longer passes `longest`.

    Pictures are padded to one of two shapes, wide or tall, and no batch of `batches`
    mixes them. For COCO's pictures of about 4:3 this leaves a fifth of a batch empty; one
    square for all would leave half of it. A batch that a caller mixes by hand is square.

    Args:
      shortest, longest: pixels.
      multiple: padded sides are multiples of it, for backbones that halve often.

    Raises:
      ValueError: sides out of order, or a number below 1.

    Source: Ren et al. 2015, "Faster R-CNN", section 3.3 (arXiv:1506.01497), with 600 and
    1000; the usual 800 is that of Lin et al. 2017, "Feature Pyramid Networks", section 5
    (arXiv:1612.03144).
    """

    shortest: int
    longest: int
    multiple: int = 32

    def __post_init__(self):
        if not 1 <= self.shortest <= self.longest or self.multiple < 1:
            raise ValueError(
                f"{self}: give 1 <= shortest <= longest pixels and a multiple of at least 1"
            )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of wide and of tall pictures, padded."""
        low, high = (-(-n // self.multiple) * self.multiple for n in (self.shortest, self.longest))
        return (low, high), (high, low)

    def groups(self, sizes: Int[np.ndarray, "N 2"]) -> Int[np.ndarray, "N"]:
        """Which of `shapes` each picture is padded to."""
        return (sizes[:, 0] > sizes[:, 1]).astype(np.int32)

    def resized(self, sizes: Int[np.ndarray, "N 2"]) -> Int[np.ndarray, "N 2"]:
        """Rows and columns of each picture, scaled."""
        scale = np.minimum(self.shortest / sizes.min(axis=1), self.longest / sizes.max(axis=1))
        return np.maximum(np.round(sizes * scale[:, None]), 1).astype(np.int32)


SHORTEST_800 = ShortestSide(800, 1333)


@dataclasses.dataclass(frozen=True)
class FixedSize:
    """Stretches every picture to one size; proportions are not kept and nothing is padded.

    Args:
      rows, columns: pixels.

    Raises:
      ValueError: a number below 1.
    """

    rows: int
    columns: int

    def __post_init__(self):
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"{self}: give at least 1 row and 1 column")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The one shape."""
        return ((self.rows, self.columns),)

    def groups(self, sizes: Int[np.ndarray, "N 2"]) -> Int[np.ndarray, "N"]:
        """All 0."""
        return np.zeros(len(sizes), np.int32)

    def resized(self, sizes: Int[np.ndarray, "N 2"]) -> Int[np.ndarray, "N 2"]:
        """The one size for each."""
        return np.tile(np.array(self.shapes, np.int32), (len(sizes), 1))
