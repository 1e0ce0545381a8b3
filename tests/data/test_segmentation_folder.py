"""Folders of images and masks that the tests write, against torch and NumPy."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from jaxmodels.data import batches, segmentation_folder

NAMES = ("background", "cat", "dog")
RNG = np.random.default_rng(0)


def write(root, name, shape=(6, 9), mask=None, mode="L", suffix=".png", picture=None):
    for part in ("images", "masks"):
        (root / part).mkdir(exist_ok=True)
    if picture is None:
        picture = RNG.integers(0, 256, (*shape, 3), np.uint8)
    if mask is None:
        mask = RNG.integers(0, 3, shape, np.uint8)
    Image.fromarray(picture).save(root / "images" / f"{name}{suffix}")
    image = Image.fromarray(mask)
    if mode == "P":
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([0, 0, 0, 250, 10, 20, 30, 240, 50] + [7] * 759)
    image.save(root / "masks" / f"{name}.png")
    return picture, mask


@pytest.mark.parametrize("mode", ["L", "P"])
def test_pictures_of_that_size_are_read_as_they_are(tmp_path, mode):
    wrote = {name: write(tmp_path, name, mode=mode) for name in ("b", "a", "c.x")}
    wrote["a"][1][2, 3] = 255
    Image.fromarray(wrote["a"][1]).save(tmp_path / "masks" / "a.png")
    (tmp_path / "images" / ".hidden.png").write_text("left out")
    (tmp_path / "masks" / "notes.txt").write_text("left out")
    dataset = segmentation_folder(tmp_path, image_size=(6, 9), class_names=NAMES, flip=False)
    images, masks = dataset.take(np.arange(3))
    for i, name in enumerate(("a", "b", "c.x")):
        np.testing.assert_allclose((images[i] + 1) * 127.5, wrote[name][0], atol=1e-4)
        np.testing.assert_array_equal(masks[i], wrote[name][1])
    assert masks.dtype == np.int32 and images.dtype == np.float32 and masks[0, 2, 3] == 255
    assert len(dataset) == 3 and dataset.class_names == NAMES


def test_other_sizes_are_scaled_bilinearly_and_by_the_nearest_pixel(tmp_path):
    picture, mask = write(tmp_path, "a", (12, 20))
    small, classes = write(tmp_path, "b", (3, 4))
    dataset = segmentation_folder(tmp_path, image_size=(6, 5), class_names=NAMES)
    images, masks = dataset.take(np.array([0, 1]))
    for i, (source, labels) in enumerate([(picture, mask), (small, classes)]):
        planes = torch.from_numpy(source.transpose(2, 0, 1).astype(np.float32))[None]
        want = torch.nn.functional.interpolate(planes, (6, 5), mode="bilinear", antialias=True)
        np.testing.assert_allclose((images[i] + 1) * 127.5, want[0].permute(1, 2, 0), atol=1.01)
        rows = ((np.arange(6) + 0.5) * labels.shape[0] / 6).astype(int)
        columns = ((np.arange(5) + 0.5) * labels.shape[1] / 5).astype(int)
        np.testing.assert_array_equal(masks[i], labels[rows][:, columns])


def test_batches_mirror_picture_and_mask_together(tmp_path):
    for number in range(16):
        mask = RNG.integers(0, 3, (5, 7), np.uint8)
        write(tmp_path, f"{number:02}", mask=mask, picture=np.stack([mask * 100] * 3, axis=-1))
    dataset = segmentation_folder(tmp_path, image_size=(5, 7), class_names=NAMES)
    batch = next(batches(dataset, 16, seed=0, shuffle=False))
    np.testing.assert_allclose((batch["image"][..., 0] + 1) * 1.275, batch["mask"], atol=1e-4)
    plain = dataset.take(np.arange(16))[1]
    mirrored = (batch["mask"] == plain[:, :, ::-1]).all(axis=(1, 2))
    straight = (batch["mask"] == plain).all(axis=(1, 2))
    assert np.all(mirrored | straight) and 2 < mirrored.sum() < 14


def test_grey_and_another_ignored_level(tmp_path):
    _, mask = write(tmp_path, "a", suffix=".jpg")
    dataset = segmentation_folder(
        tmp_path, image_size=(6, 9), class_names=NAMES[:2], ignore_label=2, channels=1
    )
    images, masks = dataset.take(np.array([0]))
    assert images.shape == (1, 6, 9, 1)
    np.testing.assert_array_equal(masks[0], np.where(mask == 2, 255, mask))


def read(path, **options):
    return segmentation_folder(path, **{"image_size": (6, 9), "class_names": NAMES} | options)


def test_masks_that_do_not_fit_are_named(tmp_path):
    write(tmp_path, "a", mask=np.zeros((9, 6), np.uint8))
    with pytest.raises(ValueError, match=r"masks/a\.png' is 9 x 6 pixels, its picture 6 x 9"):
        read(tmp_path)
    write(tmp_path, "a", mask=np.full((6, 9), 3, np.uint8))
    with pytest.raises(ValueError, match=r"a\.png' holds label 3, which is neither below the 3 cl"):
        read(tmp_path)
    write(tmp_path, "a", mask=np.zeros((6, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png' has mode RGB; give a grey or palette PNG"):
        read(tmp_path)
    (tmp_path / "masks" / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"masks/a\.png' cannot be decoded"):
        read(tmp_path)


def test_files_that_have_no_partner_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*images'; pass one that holds images and ma"):
        read(tmp_path)
    write(tmp_path, "a")
    write(tmp_path, "b")
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"no pair of picture and mask in .* for 'b'; each needs"):
        read(tmp_path)
    Image.new("RGB", (9, 6)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"images' differ only in their endings"):
        read(tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"no \.jpg, \.jpeg, \.png files in .*masks'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (0, 3)}, r"image_size=\(0, 3\) is not positive"),
        ({"class_names": ()}, "0 class_names; give 1 to 255"),
        ({"channels": 2}, "channels=2; pass 3 for colour or 1 for grey"),
    ],
)
def test_impossible_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"segmentation_folder: {message}"):
        inspect.unwrap(read)(tmp_path, **options)
