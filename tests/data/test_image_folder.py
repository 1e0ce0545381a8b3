"""Folders of pictures that the tests write, against Pillow, torch and scikit-image."""

import itertools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageOps

from jaxmodels.data import batches, image_folder
from jaxmodels.data.jpeg import decode_jpeg_into


def levels(dataset):
    """The pictures as 0 to 255."""
    return (dataset.arrays()[0] + 1) * 127.5


def noise(rows, columns, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, channels), np.uint8)


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.squeeze(picture)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 2, 1 and 3 pictures, with files of other kinds in between."""
    root = tmp_path / "pictures"
    for number, name in enumerate(["b/2.png", "b/10.PNG", "a/x.png", "c/d/e.png", "c/f.jpeg"]):
        save(root / name, noise(13, 13, seed=number))
    save(root / "c/g.jpg", noise(13, 13, seed=9))
    (root / "b/notes.txt").write_text("not a picture, and not called one")
    (root / "README.png").write_text("belongs to no class")
    (root / "a/._x.png").write_text("what a Mac leaves on other disks")
    (root / ".hidden").mkdir()
    return root


def test_sorted_folders_are_the_classes_and_other_files_are_ignored(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = image_folder(folder, image_size=13)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.labels.tolist() == [0, 1, 1, 2, 2, 2] and dataset.labels.dtype == np.int32
    assert dataset.image_shape == (13, 13, 3) and len(dataset) == 6 and dataset.flip
    order = [2, 1, 0, 3]  # "10.PNG" sorts before "2.png"
    want = np.stack([noise(13, 13, seed=seed) for seed in order])
    np.testing.assert_allclose(levels(dataset)[:4], want, atol=1e-4)


@pytest.mark.parametrize("shape", [(17, 17), (23, 17), (17, 29)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_shorter_side_is_scaled_as_torch_scales_it_and_the_centre_kept(
    tmp_path, shape, channels
):
    rows, columns = shape
    picture = noise(3 * rows, 3 * columns, channels)
    save(tmp_path / "a" / "x.png", picture)
    got = levels(image_folder(tmp_path, image_size=17, channels=channels))[0]
    top, left = (rows - 17) // 2, (columns - 17) // 2
    want = torch_resize(picture, shape)[top : top + 17, left : left + 17]
    np.testing.assert_allclose(got, want, atol=1.01)


def torch_resize(picture, shape):
    planes = torch.from_numpy(np.ascontiguousarray(picture, np.float32).transpose(2, 0, 1))[None]
    scaled = torch.nn.functional.interpolate(
        planes, shape, mode="bicubic", antialias=True, align_corners=False
    )
    return scaled[0].numpy().transpose(1, 2, 0).clip(0, 255)


def quadrants(size=32):
    """Flat coloured quarters, which survive JPEG and palettes: red, green; blue, white."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return colours.repeat(size // 2, 0).repeat(size // 2, 1)


def corners(dataset):
    return levels(dataset)[0][2::28, 2::28]


def write_kind(kind, path):
    image = Image.fromarray(quadrants())
    if kind == "CMYK":
        image.convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
    elif kind == "palette with transparency":
        palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
        palette.save(path.with_suffix(".png"), transparency=bytes([255, 0, 128]))
    elif kind == "RGBA":
        image.convert("RGBA").save(path.with_suffix(".png"))
    elif kind == "palette":
        image.convert("P").save(path.with_suffix(".png"))
    else:
        image.save(path.with_suffix(".jpg"), quality=95)


@pytest.mark.parametrize("kind", ["RGB", "CMYK", "palette", "palette with transparency", "RGBA"])
def test_every_colour_mode_shows_the_same_picture(tmp_path, kind):
    (tmp_path / "a").mkdir()
    write_kind(kind, tmp_path / "a" / "x")
    got = corners(image_folder(tmp_path, image_size=32, strict=True))
    np.testing.assert_allclose(got, quadrants(2), atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    # The inverse of each tag, as the EXIF standard numbers them.
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation](quadrants())
    exif = Image.Exif()
    exif[274] = orientation
    save(tmp_path / "a" / "x.jpg", np.ascontiguousarray(stored), exif=exif, quality=95)
    got = corners(image_folder(tmp_path, image_size=32))
    np.testing.assert_allclose(got, quadrants(2), atol=6)


def test_orientation_in_xmp_is_undone(tmp_path):
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    stored = np.ascontiguousarray(np.rot90(quadrants(), 1))
    save(tmp_path / "a" / "x.jpg", stored, xmp=packet, quality=95)
    got = corners(image_folder(tmp_path, image_size=32))
    np.testing.assert_allclose(got, quadrants(2), atol=6)


KINDS_OF_JPEG = [
    {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
    {"quality": 7}, {"keep_rgb": True}, {"mode": "L"}, {"mode": "CMYK"}, {"size": 40},
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS_OF_JPEG, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpegs_are_what_pillow_reads_mirrored_or_not(tmp_path, options, channels):
    options = dict(options)
    mode, size = options.pop("mode", "RGB"), options.pop("size", 37)
    (tmp_path / "a").mkdir()
    image = Image.fromarray(noise(size, size)).convert(mode)
    image.save(tmp_path / "a" / "x.jpg", **options)
    want = Image.open(tmp_path / "a" / "x.jpg").convert("RGB" if channels == 3 else "L")
    want = ImageOps.fit(want, (37, 37), Image.Resampling.BICUBIC)
    pixels = image_folder(tmp_path, image_size=37, channels=channels, cache=False).pixels
    plain, _ = pixels.read(np.array([0]), np.array([False]))
    mirrored, _ = pixels.read(np.array([0]), np.array([True]))
    np.testing.assert_array_equal(plain[0], np.asarray(want).reshape(37, 37, channels))
    np.testing.assert_array_equal(mirrored[0], plain[0, :, ::-1])


def test_colour_jpegs_of_the_size_take_the_short_way(tmp_path):
    """And nothing else does, a cut one included."""
    save(tmp_path / "x.jpg", noise(37, 37))
    data = (tmp_path / "x.jpg").read_bytes()
    picture = np.zeros((37, 37, 3), np.uint8)
    assert decode_jpeg_into(data, picture)
    np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / "x.jpg")))
    assert not decode_jpeg_into(data, np.zeros((37, 36, 3), np.uint8))
    assert not decode_jpeg_into(data[:-40], picture) and not decode_jpeg_into(b"", picture)
    save(tmp_path / "x.png", noise(37, 37))
    assert not decode_jpeg_into((tmp_path / "x.png").read_bytes(), picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_keeps_its_shades(tmp_path, channels):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    ramp[-1, -1] = 65535
    save(tmp_path / "a" / "x.png", ramp)
    got = levels(image_folder(tmp_path, image_size=16, channels=channels))[0]
    want = np.broadcast_to(ramp[..., None] / 257, (16, 16, channels))
    np.testing.assert_allclose(got, want, atol=0.51)


def test_colour_becomes_grey_by_luma(tmp_path):
    save(tmp_path / "a" / "x.png", quadrants())
    dataset = image_folder(tmp_path, image_size=32, channels=1)
    luma = quadrants(2) @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(corners(dataset)[..., 0], luma, atol=0.6)


def test_uncached_pictures_equal_cached_ones_and_are_read_when_asked(folder):
    save(folder / "a/y.png", noise(13, 13, seed=7))  # a class of one cannot be split
    cached = image_folder(folder, image_size=7)
    lazy = image_folder(folder, image_size=7, cache=False)
    np.testing.assert_array_equal(lazy.arrays()[0], cached.arrays()[0])
    np.testing.assert_array_equal(lazy[4]["image"], cached[4]["image"])
    parts = [dataset.split(held_out=0.5, seed=0)[1] for dataset in (cached, lazy)]
    np.testing.assert_array_equal(parts[1].arrays()[0], parts[0].arrays()[0])
    streams = [batches(dataset, 4, seed=2, num_epochs=2) for dataset in (cached, lazy)]
    for left, right in zip(*streams, strict=True):
        np.testing.assert_array_equal(left["image"], right["image"])
    shutil.rmtree(folder)
    assert len(cached.arrays()[0]) == 7
    with (
        pytest.warns(UserWarning, match=r"[124] picture\(s\) cannot be read any more"),
        pytest.raises(OSError, match=r"none of 7 pictures can be read.*x\.png' \(No such file"),
    ):
        lazy.arrays()


def test_workers_decode_uncached_pictures(folder):
    """And put the same picture in the place of one that is gone."""
    dataset = image_folder(folder, image_size=7, cache=False)
    (folder / "c/f.jpeg").unlink()
    with pytest.warns(UserWarning, match=r"f\.jpeg"):
        want = list(itertools.islice(batches(dataset, 3, seed=2), 3))
    stream = batches(dataset, 3, seed=2, num_workers=1)
    for batch in want:
        read = next(stream)
        np.testing.assert_array_equal(read["image"], batch["image"])
        np.testing.assert_array_equal(read["label"], batch["label"])
    stream.close()


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def test_what_is_lost_while_training_is_replaced_by_what_follows(folder):
    """One file removed, the next one cut: both show the picture and the label after them."""
    dataset = image_folder(folder, image_size=13, cache=False, flip=False)
    images, labels = dataset.arrays()
    (folder / "b/2.png").unlink()
    cut(folder / "c/d/e.png")
    (folder / "c/g.jpg").write_text("no picture at all")  # the last one: the first follows
    shown = [0, 1, 4, 4, 4, 0]
    with pytest.warns(UserWarning) as caught:
        found, names = dataset.take(np.arange(6))
    np.testing.assert_array_equal(found, images[shown])
    np.testing.assert_array_equal(names, labels[shown])
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2  # of the third nothing is said, nor of the others again
    assert "image_folder: 1 picture(s) cannot be" in said[0] and "b/2.png' (No such" in said[0]
    assert "2 picture(s)" in said[1] and "e.png' (" in said[1] and "truncated" in said[1]
    stream = batches(dataset, 3, seed=2, num_epochs=1)
    pairs = {(image.tobytes(), int(name)) for image, name in zip(images, labels, strict=True)}
    for batch in stream:
        for image, name in zip(batch["image"], batch["label"], strict=True):
            assert (image.tobytes(), int(name)) in pairs


def test_what_is_lost_never_comes_from_the_other_part(folder):
    save(folder / "a/y.png", noise(13, 13, seed=7))  # a class of one cannot be split
    dataset = image_folder(folder, image_size=13, cache=False, flip=False)
    train, test = dataset.split(held_out=0.5, seed=0)
    train_images, _ = train.arrays()
    cut(Path(train.pixels.paths[0]))
    with pytest.warns(UserWarning, match="1 picture"):
        np.testing.assert_array_equal(train.arrays()[0][0], train_images[1])
    assert {*test.pixels.paths}.isdisjoint(train.pixels.paths)


def test_strict_names_what_is_lost_while_training(folder):
    dataset = image_folder(folder, image_size=13, cache=False, strict=True)
    (folder / "b/2.png").unlink()
    with pytest.raises(OSError, match=r"b/2\.png' cannot be read any more \(No such file.*strict"):
        list(batches(dataset, 2, seed=0, num_epochs=1))


@pytest.fixture
def broken(folder):
    """The folder with a truncated JPEG, a truncated PNG and a text called .png added."""
    for name in ("b/cut.jpg", "c/cut.png"):
        save(folder / name, noise(37, 37))
        cut(folder / name)
    (folder / "a/text.png").write_text("this is no picture")
    return folder


@pytest.mark.parametrize("cache", [True, False])
def test_broken_files_are_skipped_counted_and_named(broken, cache):
    with pytest.warns(UserWarning) as caught:
        dataset = image_folder(broken, image_size=13, cache=cache)
    (warning,) = caught
    message = str(warning.message)
    assert "image_folder: skipped 3 of 9 pictures" in message and repr(str(broken)) in message
    assert f"{broken / 'a/text.png'} (not a JPEG or PNG file)" in message
    for name in ("b/cut.jpg", "c/cut.png"):
        assert f"{broken / name} (" in message
    assert message.count("truncated") == 2
    assert dataset.labels.tolist() == [0, 1, 1, 2, 2, 2]
    want = np.stack([noise(13, 13, seed=seed) for seed in (2, 1, 0, 3)])
    np.testing.assert_allclose(levels(dataset)[:4], want, atol=1e-4)


def test_strict_makes_broken_files_fatal(broken):
    with pytest.raises(ValueError, match=r"3 of 9 pictures .*text\.png \(not a .*strict=False"):
        image_folder(broken, image_size=13, strict=True)


def test_many_broken_files_name_only_the_first(folder):
    for number in range(8):
        (folder / f"a/z{number}.png").write_text("no")
    with pytest.warns(UserWarning, match=r"skipped 8 of 14.*z4\.png.*; \.\.\.$") as caught:
        image_folder(folder, image_size=5)
    assert "z5.png" not in str(caught[0].message)


def test_folders_without_use_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"image_folder: path .*gone' does not exist; pass a dir"):
        image_folder(tmp_path / "gone", image_size=5)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"image_folder: path .*file' is a file; pass a directory"):
        image_folder(str(file), image_size=5)
    save(tmp_path / "flat" / "x.png", noise(5, 5))
    with pytest.raises(ValueError, match=r"flat' holds no class folders; put the pictures"):
        image_folder(tmp_path / "flat", image_size=5)
    save(tmp_path / "some" / "full" / "x.png", noise(5, 5))
    (tmp_path / "some" / "void").mkdir()
    with pytest.raises(ValueError, match=r"no readable \.jpg.* 'void' of path .*some'; add pict"):
        image_folder(tmp_path / "some", image_size=5)


def test_a_class_of_broken_files_only_is_fatal(folder):
    (folder / "a/x.png").write_text("no")
    with (
        pytest.warns(UserWarning, match="skipped 1 of 6"),
        pytest.raises(ValueError, match=r"class folder\(s\) 'a' of"),
    ):
        image_folder(folder, image_size=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size=0 is not positive"),
        ({"image_size": 5, "channels": 2}, "channels=2; pass 3 for colour or 1 for grey"),
    ],
)
def test_impossible_sizes_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=f"image_folder: {message}"):
        image_folder(folder, **arguments)


def test_photographs_from_disk_to_resumed_batches(tmp_path):
    """End to end on the pictures that come with scikit-image."""
    bundled = Path(skimage.__file__).parent / "data"
    kinds = {
        "colour": ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"],
        "grey": ["camera.png", "coins.png", "moon.png", "page.png", "text.png"],
    }
    for kind, names in kinds.items():
        (tmp_path / kind).mkdir()
        for name in names:
            shutil.copy(bundled / name, tmp_path / kind)
    dataset = image_folder(tmp_path, image_size=32, strict=True)
    assert len(dataset) == 9 and dataset.class_names == ("colour", "grey")
    images, labels = dataset.arrays()
    assert images.min() >= -1 and images.max() <= 1 and images.std(axis=(1, 2, 3)).min() > 0.05
    # Grey pictures have equal channels, colour pictures do not.
    np.testing.assert_array_equal(np.ptp(images, axis=-1).max(axis=(1, 2)) > 0, labels == 0)
    astronaut = torch_resize(np.asarray(Image.open(bundled / "astronaut.png")), (32, 32))
    # Pillow clips overshoot between its two passes, which shows at sharp edges.
    gap = np.abs(levels(dataset)[0] - astronaut)
    assert gap.mean() < 0.5 and gap.max() < 8
    stream = batches(dataset, 4, seed=0)
    for _ in range(5):
        assert next(stream)["image"].shape == (4, 32, 32, 3)
    resumed = batches(dataset, 4, seed=0)
    resumed.set_state(json.loads(json.dumps(stream.get_state())))
    np.testing.assert_array_equal(next(resumed)["image"], next(stream)["image"])
