"""Labelled pictures of one size as a data set."""

import dataclasses
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8


@runtime_checkable
class Pixels(Protocol):
    """A uint8 (N, Y, X, C) array, or what turns into one by `np.asarray` when it is needed.

    If it also has `read`, that takes indices and which of them to mirror left to right, and
    returns levels and the indices of what they show, others where some cannot be read.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """N, Y, X, C."""

    def __getitem__(self, indices: Int[np.ndarray, "B"], /) -> "Pixels":
        """The pictures at `indices`."""

    def __array__(self) -> UInt8[np.ndarray, "N Y X C"]:
        """The levels of all pictures."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled pictures of one size; a random-access source for Grain.

    Attributes:
      pixels: grey or colour levels, 0 to `white`.
      labels: the class of each picture, an index into `class_names`.
      class_names: one name per class.
      white: the level that becomes 1; level 0 becomes -1.
      flip: whether `batches` mirrors pictures at random; indexing never does.
    """

    pixels: Pixels
    labels: Int32[np.ndarray, "N"]
    class_names: tuple[str, ...]
    white: int = 255
    flip: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of every picture."""
        _, rows, columns, channels = self.pixels.shape
        return rows, columns, channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        images, labels = self.take(np.array([index]))
        return {"image": images[0], "label": labels[0]}

    def take(
        self, indices: Int[np.ndarray, "B"]
    ) -> tuple[Float32[np.ndarray, "B Y X C"], Int32[np.ndarray, "B"]]:
        """Pictures in [-1, 1] and their labels, several at once."""
        levels, labels = self._levels(indices, np.zeros(len(indices), bool))
        return self._scaled(levels), labels

    def batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`{"image": (B, Y, X, C), "label": (B,)}`, mirrored at random if `flip`."""
        return self.finish(self.compact_batch(indices, rng))

    def compact_batch(
        self, indices: Int[np.ndarray, "B"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """A batch of levels, a quarter of the size; `finish` makes it whole."""
        draws = rng.random(len(indices)) if self.flip else np.ones(len(indices))
        levels, labels = self._levels(indices, draws < 0.5)
        return {"image": levels, "label": labels}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """From grey or colour levels to [-1, 1]; in compiled code, too, but for rounding."""
        return {**batch, "image": self._scaled(batch["image"])}

    def _levels(self, indices, mirrored):
        if hasattr(self.pixels, "read"):
            levels, indices = self.pixels.read(indices, mirrored)
        else:
            levels = np.asarray(self.pixels[indices])
            levels[mirrored] = levels[mirrored, :, ::-1]
        return levels, self.labels[indices]

    def _scaled(self, levels: UInt8[Any, "B Y X C"]) -> Float32[Any, "B Y X C"]:
        if not isinstance(levels, np.ndarray):  # of JAX, which fuses this into what follows
            return levels.astype(np.float32) / np.float32(self.white / 2) - 1
        images = np.empty(levels.shape, np.float32)
        # One by one, a picture is still in the cache when it is scaled and shifted.
        for image, level in zip(images, levels, strict=True):
            np.divide(level, np.float32(self.white / 2), out=image, dtype=np.float32)
            image -= 1
        return images

    def arrays(self) -> tuple[Float32[np.ndarray, "N Y X C"], Int32[np.ndarray, "N"]]:
        """The whole data set as two arrays, in order and unmirrored."""
        return self.take(np.arange(len(self)))

    def split(self, *, held_out: float, seed: int) -> tuple["ImageDataset", "ImageDataset"]:
        """Splits off a part with the same proportions of classes.

        Args:
          held_out: the share of pictures in the second part, between 0 and 1.
          seed: of the choice; the same seed always chooses the same pictures.

        Returns:
          The pictures to learn from, and those held out.

        Raises:
          ValueError: too few pictures of some class for this share.
        """
        # scikit-learn takes a second to import, and most programs never split.
        from sklearn.model_selection import train_test_split

        try:
            parts = train_test_split(
                np.arange(len(self)), test_size=held_out, random_state=seed, stratify=self.labels
            )
        except ValueError as error:
            raise ValueError(
                f"ImageDataset.split: held_out={held_out} does not suit {len(self)} pictures of "
                f"{len(self.class_names)} classes: {str(error).rstrip('.')}; "
                "add pictures or change held_out"
            ) from error
        train, test = (
            dataclasses.replace(self, pixels=self.pixels[part], labels=self.labels[part])
            for part in parts
        )
        return train, test
