"""idx files, written by the tests byte for byte."""

import gzip
import inspect
import struct

import numpy as np
import pytest

from jaxmodels.data import batches, mnist

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 11), np.uint8)
LABELS = np.array([3, 9, 0, 1, 3], np.uint8)


def idx(array, kind=8):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.tobytes()


def write(folder, prefix="train", images=None, labels=None, zipped=False, dot="-"):
    for name, content in (
        (f"{prefix}-images{dot}idx3-ubyte", idx(PIXELS) if images is None else images),
        (f"{prefix}-labels{dot}idx1-ubyte", idx(LABELS) if labels is None else labels),
    ):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("split", "prefix", "dot"), [("train", "train", "-"), ("test", "t10k", ".")]
)
def test_reads_what_was_written(tmp_path, zipped, split, prefix, dot):
    write(tmp_path, prefix, zipped=zipped, dot=dot)
    dataset = mnist(tmp_path, split)
    images, labels = dataset.arrays()
    np.testing.assert_allclose((images[..., 0] + 1) * 127.5, PIXELS, atol=1e-4)
    np.testing.assert_array_equal(labels, LABELS)
    assert dataset.image_shape == (7, 11, 1) and dataset.class_names == tuple("0123456789")
    assert labels.dtype == np.int32 and not dataset.flip
    assert next(batches(dataset, 2, seed=0))["image"].shape == (2, 7, 11, 1)


def test_truncated_files_are_named_with_their_bytes(tmp_path):
    write(tmp_path, images=idx(PIXELS)[:-1])
    with pytest.raises(
        ValueError, match=r"train-images.* found 400 bytes, expected 401 for \[5, 7, 11\]"
    ):
        mnist(tmp_path, "train")
    write(tmp_path, images=idx(PIXELS)[:9])
    with pytest.raises(ValueError, match="found 9 bytes, expected a header of 16"):
        mnist(tmp_path, "train")
    write(tmp_path, labels=idx(LABELS) + b"x")
    with pytest.raises(ValueError, match=r"train-labels.* found 14 bytes, expected 13 for \[5\]"):
        mnist(tmp_path, "train")


def test_a_truncated_gzip_file_is_named(tmp_path):
    write(tmp_path, "t10k", zipped=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"mnist: .*\.gz' \(\d+ bytes\) is no whole gzip file: "):
        mnist(tmp_path, "test")
    file.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match=r"\(14 bytes\) is no whole gzip file"):
        mnist(tmp_path, "test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images": idx(PIXELS, kind=13)}, "begins with 00 00 0d 03, not 00 00 08 03, so it is no"),
        ({"images": idx(PIXELS[0]) + bytes(9)}, "begins with 00 00 08 02, not 00 00 08 03"),
        ({"labels": idx(LABELS[:3])}, "mnist: 5 pictures but 3 labels in"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        mnist(tmp_path, "train")


def test_missing_files_and_unknown_splits_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of t10k-images-idx3-ubyte, .*ubyte\.gz"):
        mnist(tmp_path, "test")
    with pytest.raises(ValueError, match="mnist: unknown split 'val'; pass 'train' or 'test'"):
        inspect.unwrap(mnist)(tmp_path, "val")
