"""Handwritten digits, small enough to learn in minutes on a laptop."""

from typing import Literal

import numpy as np

from jaxmodels.data.image_dataset import ImageDataset

_WHITE = 16


def digits(split: Literal["train", "test"]) -> ImageDataset:
    """The 8 x 8 handwritten digits that come with scikit-learn, in a fixed split.

    Grey level 0 becomes -1 and level 16 becomes 1. The split is stratified, so
    both parts hold the ten digits in equal proportion, and it never changes.

    Args:
      split: `"train"` (1,437 pictures) or `"test"` (360).

    Returns:
      Pictures of shape (8, 8, 1), labels 0 to 9; they are never mirrored,
      because a mirrored digit is not a digit.

    Raises:
      ValueError: unknown split.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository; the copy inside scikit-learn.
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits: unknown split {split!r}; pass 'train' or 'test'")
    # scikit-learn takes a second to import; who reads their own pictures need not wait for it.
    from sklearn.datasets import load_digits

    source = load_digits()
    whole = ImageDataset(
        pixels=source.images.astype(np.uint8)[..., None],
        labels=source.target.astype(np.int32),
        class_names=tuple(map(str, source.target_names)),
        white=_WHITE,
    )
    train, test = whole.split(held_out=0.2, seed=0)
    return train if split == "train" else test
