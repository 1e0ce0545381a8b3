"""CIFAR's binary files, written by the tests byte for byte."""

import inspect

import numpy as np
import pytest

from jaxmodels.data import batches, cifar10, cifar100


def records(count, label_columns, seed):
    """Labels (N, columns), pictures (N, 32, 32, 3), and the bytes of both in CIFAR's order."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(n, size=count) for n in label_columns], axis=1)
    pictures = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    planes = b"".join(
        bytes(label.tolist()) + b"".join(picture[..., c].tobytes() for c in range(3))
        for label, picture in zip(labels, pictures, strict=True)
    )
    return labels, pictures, planes


@pytest.fixture
def ten(tmp_path):
    wrote = {}
    files = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    for number, name in enumerate(files):
        *wrote[name], data = records(3, [10], seed=number)
        (tmp_path / name).write_bytes(data)
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    return tmp_path, wrote, tuple(names)


def test_cifar10_reads_what_was_written(ten):
    path, wrote, names = ten
    for split, files in (("train", list(wrote)[:5]), ("test", ["test_batch.bin"])):
        dataset = cifar10(path, split)
        images, labels = dataset.arrays()
        want = np.concatenate([wrote[name][1] for name in files])
        np.testing.assert_allclose((images + 1) * 127.5, want, atol=1e-4)
        np.testing.assert_array_equal(
            labels, np.concatenate([wrote[name][0][:, 0] for name in files])
        )
        assert dataset.class_names == names and dataset.image_shape == (32, 32, 3)
        assert labels.dtype == np.int32 and not dataset.flip
    stream = batches(cifar10(path, "train", flip=True), 4, seed=0)
    assert next(stream)["image"].shape == (4, 32, 32, 3)


def test_cifar100_has_two_labels(tmp_path):
    labels, pictures, data = records(7, [20, 100], seed=0)
    (tmp_path / "train.bin").write_bytes(data)
    (tmp_path / "coarse_label_names.txt").write_text("\n".join(f"group{n}" for n in range(20)))
    fine, coarse = cifar100(tmp_path, "train"), cifar100(tmp_path, "train", labels="coarse")
    np.testing.assert_array_equal(fine.labels, labels[:, 1])
    np.testing.assert_array_equal(coarse.labels, labels[:, 0])
    np.testing.assert_array_equal(fine.pixels, pictures)
    assert fine.class_names == tuple(map(str, range(100)))  # no list of them was written
    assert coarse.class_names[19] == "group19"


def test_truncated_and_missing_files_are_named(ten):
    path, _, _ = ten
    file = path / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError,
        match=r"cifar10: .*test_batch\.bin' is truncated: found 9209 bytes, .* of 3073, as 9219",
    ):
        cifar10(path, "test")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="found 0 bytes, expected a multiple of 3073, as 3073"):
        cifar10(path, "test")
    (path / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"cifar10: no file .*data_batch_3\.bin'; pass the folder"):
        cifar10(path, "train")


def test_other_mistakes_are_named(tmp_path):
    # The bytes of three records of one kind are no whole number of the other's.
    (tmp_path / "test_batch.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match="holds label 10, beyond the 10 classes; is it the other"):
        cifar10(tmp_path, "test")
    with pytest.raises(ValueError, match="cifar10: unknown split 'val'; pass 'train' or 'test'"):
        inspect.unwrap(cifar10)(tmp_path, "val")
    with pytest.raises(ValueError, match="cifar100: unknown labels 'both'; pass 'fine' or"):
        inspect.unwrap(cifar100)(tmp_path, "train", labels="both")
