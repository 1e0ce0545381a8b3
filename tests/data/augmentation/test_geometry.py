"""Flips, crops and affine maps on images where the answer is known, and against SciPy and torch."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import torch

from jaxmodels.data.augmentation import affine, flip_horizontal, flip_vertical, resized_crop

B, Y, X = 5, 23, 29
MOVES = {
    "flip_horizontal": flip_horizontal,
    "flip_vertical": flip_vertical,
    "resized_crop": functools.partial(resized_crop, area=(0.5, 1.0)),
    "shift": functools.partial(affine, rotation=0.0, scale=(1.0, 1.0), translation=0.2),
    "affine": functools.partial(affine, rotation=30.0, translation=0.1, shear=10.0),
}


def scenes():
    """A bright box in each image, with its mask, box and instance; box 1 is padding."""
    rng = np.random.default_rng(0)
    image, mask = np.full((B, Y, X, 3), -1, np.float32), np.zeros((B, Y, X), np.int32)
    boxes = np.zeros((B, 2, 4), np.float32)
    for i in range(B):
        top, left = rng.integers(5, 9), rng.integers(6, 12)
        bottom, right = top + rng.integers(6, 9), left + rng.integers(7, 10)
        image[i, top:bottom, left:right] = 1
        mask[i, top:bottom, left:right] = 1
        boxes[i, 0] = left, top, right, bottom
    labels = np.tile([3, -1], (B, 1)).astype(np.int32)
    batch = {"image": image, "mask": mask * 4, "instances": mask, "boxes": boxes}
    return jax.tree.map(jnp.asarray, {**batch, "box_labels": labels, "label": np.arange(B)})


@pytest.mark.parametrize("name", MOVES)
def test_box_mask_and_instances_follow_the_object(name):
    batch = scenes()
    out = jax.jit(MOVES[name])(batch, jax.random.key(3))
    bright = np.asarray(out["image"][..., 0]) > 0
    np.testing.assert_array_equal(out["label"], batch["label"])
    exact = name not in ("affine", "resized_crop")
    for i in range(B):
        if not bright[i].any():
            assert name == "resized_crop" and out["box_labels"][i, 0] == -1
            continue
        rows, columns = np.nonzero(bright[i])
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        want = np.asarray(out["boxes"][i, 0])
        if name == "shift":
            # The shift is a fraction of a pixel, so the edge is blurred.
            np.testing.assert_allclose(seen, want, atol=0.51)
        elif name == "affine":
            # The hull of the turned corners, which are cut off by the pixels.
            np.testing.assert_allclose(seen, want, atol=1.6)
        else:
            np.testing.assert_allclose(seen, want, atol=1e-3 if exact else 1.01)
        shown = np.asarray(out["instances"][i]) == 1
        edge = scipy.ndimage.binary_dilation(bright[i]) & ~scipy.ndimage.binary_erosion(bright[i])
        assert not np.any((shown != bright[i]) & ~edge)
        if name.startswith("flip"):
            np.testing.assert_array_equal(shown, bright[i])
        np.testing.assert_array_equal(np.asarray(out["mask"][i]) == 4, shown)
        assert out["box_labels"][i].tolist() == [3, -1]
    # Different images are moved differently, unless there are two ways only.
    moved = np.asarray(out["boxes"] - batch["boxes"])[:, 0]
    assert len({tuple(m.round(3)) for m in moved}) >= (2 if name.startswith("flip") else B)


@pytest.mark.parametrize("name", ["flip_vertical", "resized_crop", "affine"])
def test_compiled_or_not_the_same_key_gives_the_same_and_another_another(name):
    batch, move = scenes(), MOVES[name]
    plain, compiled = move(batch, jax.random.key(0)), jax.jit(move)(batch, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), plain, compiled)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, plain, batch))
    other = move(batch, jax.random.key(2))
    assert np.any(plain["image"] != other["image"])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    both = jax.vmap(move)(stacked, jnp.stack([jax.random.key(0), jax.random.key(2)]))
    np.testing.assert_allclose(both["image"][0], plain["image"], atol=2e-4)
    np.testing.assert_allclose(both["image"][1], other["image"], atol=2e-4)


@pytest.mark.parametrize(("flip", "axis"), [(flip_horizontal, 2), (flip_vertical, 1)])
def test_a_flip_is_exact(flip, axis):
    images = jax.random.uniform(jax.random.key(0), (300, 3, 5, 1))
    out = flip({"image": images}, jax.random.key(1))["image"]
    mirrored = np.all(out == np.flip(images, axis), axis=(1, 2, 3))
    np.testing.assert_array_equal(out[~mirrored], images[~mirrored])
    assert 0.4 < mirrored.mean() < 0.6
    always = flip({"image": images}, jax.random.key(1), probability=1.0)["image"]
    np.testing.assert_array_equal(always, np.flip(images, axis))


def ramps():
    """Images that say where each of their pixels came from: column and row of its centre."""
    y, x = np.mgrid[:Y, :X] + 0.5
    return jnp.asarray(np.tile(np.stack([x, y, 0 * x], -1)[None], (64, 1, 1, 1)), jnp.float32)


def test_crops_are_those_torch_scales():
    rng = np.random.default_rng(0)
    images = np.concatenate([rng.normal(size=(64, Y, X, 2)), np.zeros((64, Y, X, 1))], -1)
    images = images.astype(np.float32)
    full = np.tile(np.array([0, 0, X, Y], np.float32), (64, 1, 1))
    batch = {"image": jnp.asarray(images), "boxes": jnp.asarray(full)}
    key, options = jax.random.key(2), {"area": (0.2, 0.7), "aspect": (0.5, 2.0)}
    out = jax.jit(functools.partial(resized_crop, **options))(batch, key)
    place = resized_crop({"image": ramps()}, key, **options)["image"]
    shares, ratios = [], []
    for i in range(64):
        # Interpolation of a ramp is exact inside, so the rectangle can be read off it.
        step_x, step_y = (np.diff(np.asarray(place[i, ..., c]), axis=1 - c).max() for c in (0, 1))
        width, height = round(step_x * X), round(step_y * Y)
        left, top = (round(float(place[i, ..., c].min()) - 0.5) for c in (0, 1))
        cut = torch.tensor(images[i, top : top + height, left : left + width]).permute(2, 0, 1)
        want = torch.nn.functional.interpolate(cut[None], (Y, X), mode="bilinear")
        np.testing.assert_allclose(out["image"][i], want[0].permute(1, 2, 0), atol=2e-4)
        shares.append(width * height / (X * Y))
        ratios.append(width / height)
    assert 0.17 < min(shares) < 0.3 < 0.55 < max(shares) < 0.75
    assert 0.42 < min(ratios) < 0.7 < 1.4 < max(ratios) < 2.3
    np.testing.assert_allclose(out["boxes"], full)


def test_crops_are_anywhere_inside_and_as_often_wide_as_high():
    """Each pixel says where it came from, so the corners tell the rectangle."""
    side = 20
    y, x = np.mgrid[:side, :side] + 0.5
    places = jnp.asarray(np.tile(np.stack([x, y, 0 * x], -1)[None], (500, 1, 1, 1)), jnp.float32)
    options = {"area": (0.6, 0.6), "aspect": (0.4, 2.5)}
    out = np.asarray(resized_crop({"image": places}, jax.random.key(0), **options)["image"])
    low, high = np.round(out[:, 0, 0, :2] - 0.5), np.round(out[:, -1, -1, :2] + 0.5)
    size = high - low
    # The same share whatever fits: a draw that does not is drawn again, not cut down.
    np.testing.assert_allclose(size.prod(axis=1) / side**2, 0.6, atol=0.045)
    assert abs(np.mean(size[:, 0] > size[:, 1]) - np.mean(size[:, 0] < size[:, 1])) < 0.15
    room = side - size
    for edge in (low, room - low):
        touches = np.mean(edge[room > 0] == 0)
        assert abs(touches - np.mean(1 / (room[room > 0] + 1))) < 0.06


@pytest.mark.parametrize(("height", "width"), [(6, 60), (60, 6)])
def test_a_crop_that_never_fits_is_cut_to_the_image(height, width):
    batch = {"image": jnp.ones((3, height, width, 1))}
    aspect = (0.05, 0.06) if width > height else (19.0, 20.0)
    out = resized_crop(batch, jax.random.key(0), area=(0.9, 1.0), aspect=aspect)
    np.testing.assert_array_equal(out["image"], batch["image"])


def test_affine_maps_are_those_of_scipy():
    images = np.random.default_rng(0).uniform(-1, 1, (4, Y, X, 3)).astype(np.float32)
    options = {"rotation": 40.0, "translation": 0.2, "scale": (0.7, 1.3), "shear": 20.0}
    key = jax.random.key(5)
    # Three corners of a box near the centre tell the map, if no hull is taken: use points.
    points = np.array([[12, 10], [15, 10], [12, 13]], np.float32)
    boxes = jnp.asarray(np.tile(np.concatenate([points, points], -1)[None], (4, 1, 1)))
    batch = {"image": jnp.asarray(images), "boxes": boxes}
    out = jax.jit(functools.partial(affine, fill=0.3, **options))(batch, key)
    for i in range(4):
        moved = np.asarray(out["boxes"][i, :, :2], np.float64)
        assert np.all((moved > 0) & (moved < [X, Y]))  # not clipped
        linear = np.stack([(moved[1] - moved[0]) / 3, (moved[2] - moved[0]) / 3], axis=1)
        inverse = np.linalg.inv(linear)
        offset = points[0] - inverse @ moved[0]
        # SciPy counts rows first and from the centre of the first pixel.
        back, shift = inverse[::-1, ::-1], (offset + inverse @ [0.5, 0.5] - 0.5)[::-1]
        for c in range(3):
            want = scipy.ndimage.affine_transform(
                images[i, ..., c].astype(np.float64),
                back,
                shift,
                order=1,
                mode="grid-constant",
                cval=0.3,
            )
            np.testing.assert_allclose(out["image"][i, ..., c], want, atol=3e-4)
        size = np.sqrt(np.linalg.det(linear))
        assert 0.7 <= size <= 1.3
        first = linear[:, 0] / size
        np.testing.assert_allclose(np.hypot(*first), 1, atol=1e-4)  # shear keeps the x axis
        assert abs(np.rad2deg(np.arctan2(first[1], first[0]))) <= 40
        slope = first @ linear[:, 1] / size
        assert abs(slope) <= np.tan(np.deg2rad(20)) + 1e-4
        centre = np.linalg.inv(inverse) @ (np.array([X, Y]) / 2 - offset)
        assert np.all(np.abs(centre / [X, Y] - 0.5) <= 0.2)


def test_affine_draws_fill_their_ranges():
    """Angle, slope, factor and both shifts are read off where three points land."""
    points = np.array([[12, 10], [15, 10], [12, 13]], np.float32)
    boxes = np.tile(np.concatenate([points, points], -1)[None], (400, 1, 1))
    batch = {"image": jnp.zeros((400, Y, X, 1)), "boxes": jnp.asarray(boxes)}
    options = {"rotation": 40.0, "translation": 0.2, "scale": (0.7, 1.3), "shear": 20.0}
    moved = np.asarray(affine(batch, jax.random.key(0), **options)["boxes"], np.float64)[..., :2]
    linear = np.stack([moved[:, 1] - moved[:, 0], moved[:, 2] - moved[:, 0]], axis=2) / 3
    factor = np.sqrt(np.linalg.det(linear))
    first = linear[:, :, 0] / factor[:, None]
    slope = np.einsum("bi,bi->b", first, linear[:, :, 1] / factor[:, None])
    centre = np.array([X, Y]) / 2
    landed = moved[:, 0] + np.einsum("bij,j->bi", linear, centre - points[0])
    drawn = [np.rad2deg(np.arctan2(first[:, 1], first[:, 0])) / 40, (factor - 1) / 0.3]
    drawn += [np.rad2deg(np.arctan(slope)) / 20, *(landed / [X, Y] - 0.5).T / 0.2]
    assert np.all(np.abs(np.mean(drawn, axis=1)) < 0.1)  # each is uniform from -1 to 1
    np.testing.assert_allclose(np.std(drawn, axis=1), np.sqrt(1 / 3), atol=0.05)
    assert np.all(np.abs(np.corrcoef(drawn) - np.eye(5)) < 0.2)


def test_no_change_and_half_the_size():
    """A map that is certain: no draw is left when all ranges are points."""
    batch = scenes()
    still = {"rotation": 0.0, "translation": 0.0}
    same = affine(batch, jax.random.key(0), scale=(1.0, 1.0), **still)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, batch)
    half = affine(batch, jax.random.key(0), scale=(0.5, 0.5), fill=0.25, **still)
    assert np.all(half["image"][:, 0] == 0.25) and np.all(half["image"][:, :, -1] == 0.25)
    assert np.all(half["mask"][:, 0] == 255) and np.all(half["instances"][:, 0] == 0)
    centre = np.array([X, Y, X, Y]) / 2
    np.testing.assert_allclose(
        half["boxes"][:, 0], centre + (np.asarray(batch["boxes"][:, 0]) - centre) / 2, rtol=1e-5
    )


def test_boxes_out_of_sight_lose_their_label_and_their_instance():
    image = jnp.zeros((40, 20, 20, 1))
    boxes = jnp.tile(jnp.array([[0.0, 0, 20, 20], [9, 9, 11, 11], [0, 0, 4, 20]])[None], (40, 1, 1))
    instances = jnp.zeros((40, 20, 20), jnp.int32).at[:, :, :4].set(3).at[:, 9:11, 9:11].set(2)
    batch = {"image": image, "boxes": boxes, "instances": instances}
    batch["box_labels"] = jnp.tile(jnp.array([[5, 6, 7]]), (40, 1))
    key = jax.random.key(0)
    cropped = functools.partial(resized_crop, area=(0.3, 0.5))
    half, any_share = (cropped(batch, key, min_visible=m) for m in (0.5, 0.0))
    area = np.prod(half["boxes"][..., 2:] - half["boxes"][..., :2], axis=-1)
    # Everything is magnified by the same factor, which the first box tells.
    kept = np.asarray(half["box_labels"]) >= 0
    assert np.all((area > 0)[kept]) and 0 < kept[:, 1].mean() <= 1 and 0 < kept[:, 2].mean() < 1
    assert np.all(np.where(kept, half["box_labels"], [[5, 6, 7]]) == [[5, 6, 7]])
    np.testing.assert_array_equal(np.asarray(any_share["box_labels"]) >= 0, area > 0)
    # The first box is larger than a crop of at most half of it: less than half is left.
    assert np.all(area[:, 0] == 400) and kept[:, 0].mean() < 0.5
    shows = [[np.any(np.asarray(half["instances"][i]) == n) for n in (2, 3)] for i in range(40)]
    assert not np.any(np.asarray(shows) & ~kept[:, 1:])
    assert np.any(np.asarray(shows) & kept[:, 1:])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (flip_horizontal, {"probability": 1.5}, r"flip_horizontal: probability holds 1.5, outside"),
        (
            resized_crop,
            {"area": (0.5, 1.2)},
            r"resized_crop: area=\(0.5, 1.2\) must be two",
        ),
        (resized_crop, {"aspect": (2.0, 1.0)}, r"aspect=\(2.0, 1.0\) must be two numbers in order"),
        (affine, {"rotation": 200.0}, r"affine: rotation holds 200, outside \[0, 180\]"),
        (affine, {"scale": (0.0, 1.0)}, r"affine: scale=\(0.0, 1.0\) must be"),
    ],
)
def test_options_out_of_range_are_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        change({"image": jnp.zeros((2, 5, 7, 3))}, jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"mask": np.zeros((2, 5, 7))}, r"the batch holds \['mask'\]; it needs 'image'"),
        (
            {"image": np.zeros((5, 7, 3), np.float32)},
            r"image of shape \(5, 7, 3\) .* of shape \(B,",
        ),
        ({"image": np.zeros((2, 5, 7, 3), np.uint8)}, r"type uint8; give floats in \[-1, 1\]"),
        (
            {"image": np.zeros((2, 3, 5, 7), np.float32)},
            "the channels seem to come first",
        ),
        ({"image": np.zeros((2, 5, 7, 4), np.float32)}, "must have 1 or 3 channels in its last"),
        (
            {"image": np.zeros((2, 5, 7, 3), np.float32), "mask": np.zeros((2, 7, 5), int)},
            r"mask \(2, 7, 5\) is of another size than image \(2, 5, 7, 3\)",
        ),
    ],
)
def test_bad_batches_are_named(batch, message):
    with pytest.raises(ValueError, match=f"resized_crop: .*{message}"):
        inspect.unwrap(resized_crop)(batch, jax.random.key(0))
