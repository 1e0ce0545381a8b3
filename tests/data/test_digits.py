"""The digits against scikit-learn's own arrays and split."""

import inspect

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jaxmodels.data import digits

PARTS = ("train", "test")


@pytest.mark.parametrize("part", PARTS)
def test_pictures_and_labels_are_those_of_scikit_learns_split(part):
    data, target = load_digits(return_X_y=True)
    split = train_test_split(data, target, test_size=0.2, random_state=0, stratify=target)
    want_grey, want_labels = split[PARTS.index(part)], split[2 + PARTS.index(part)]
    images, labels = digits(part).arrays()
    assert images.dtype == np.float32 and labels.dtype == np.int32
    assert images.shape == (len(want_grey), 8, 8, 1)
    np.testing.assert_array_equal(images.reshape(-1, 64), want_grey / 8 - 1)
    np.testing.assert_array_equal(labels, want_labels)


def test_parts_are_disjoint_pictures_of_ten_balanced_classes():
    train, test = (digits(part) for part in PARTS)
    assert (len(train), len(test)) == (1437, 360)
    seen = {picture.tobytes() for picture in train.arrays()[0]}
    assert not any(picture.tobytes() in seen for picture in test.arrays()[0])
    for part in (train, test):
        counts = np.bincount(part.arrays()[1], minlength=10)
        assert counts.min() > 0.09 * len(part)
        assert part.class_names == tuple("0123456789")
        assert part.image_shape == (8, 8, 1)
        assert not part.flip


def test_grey_levels_reach_both_ends_exactly():
    images, _ = digits("train").arrays()
    assert images.min() == -1 and images.max() == 1


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"digits: unknown split 'val'; pass 'train' or 'test'"):
        inspect.unwrap(digits)("val")  # as users run it, without the type checks of the suite
