"""What is hidden: its shape, its share, and what it is filled with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxmodels.data.augmentation import (
    IMAGENET_MEAN,
    cutout,
    grid_mask,
    hide_and_seek,
    random_erasing,
)

B, Y, X = 300, 31, 37
# No filling has this value.
BATCH = {
    "image": jnp.full((B, Y, X, 3), 7.0),
    "label": jnp.arange(B),
    "mask": jnp.ones((B, Y, X), int),
}
ALL = {"erasing": random_erasing, "cutout": cutout, "seek": hide_and_seek, "grid": grid_mask}


def hidden(change, seed=0, **options):
    """Which pixels changed; all channels do together."""
    out = jax.jit(functools.partial(change, **options))(BATCH, jax.random.key(seed))
    changed = np.asarray(out["image"]) != 7
    assert np.all(changed == changed[..., :1])
    for name in ("label", "mask"):
        np.testing.assert_array_equal(out[name], BATCH[name])
    return changed[..., 0]


def rectangle(changed):
    """Top, left, height, width, if what changed is one."""
    rows, columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert changed.sum() == height * width
    return rows[0], columns[0], height, width


def test_erasing_has_the_papers_distribution():
    changed = hidden(random_erasing, area=(0.1, 0.35), aspect=0.5)
    erased = changed.any(axis=(1, 2))
    assert 0.42 < erased.mean() < 0.58
    top, left, height, width = np.array([rectangle(c) for c in changed[erased]]).T
    share, ratio = height * width / (Y * X), height / width
    assert 0.09 < share.min() < 0.13 and 0.3 < share.max() < 0.37
    assert 0.45 < ratio.min() < 0.7 < 1.6 < ratio.max() < 2.25
    assert top.min() == left.min() == 0
    assert (top + height).max() == Y and (left + width).max() == X
    # Algorithm 1, taken literally.
    rng, found = np.random.default_rng(0), []
    while len(found) < 4000:
        area, r = rng.uniform(0.1, 0.35) * Y * X, rng.uniform(0.5, 2)
        h, w = np.sqrt(area * r), np.sqrt(area / r)
        x, y = rng.uniform(0, X), rng.uniform(0, Y)
        if x + w <= X and y + h <= Y:
            found.append((y, x, h, w))
    want = np.array(found)
    np.testing.assert_allclose(np.mean([top, left, height, width], axis=1), want.mean(0), atol=1.6)
    np.testing.assert_allclose(np.std([top, left, height, width], axis=1), want.std(0), atol=1.2)
    assert abs(share.mean() - (want[:, 2] * want[:, 3]).mean() / (Y * X)) < 0.02


def test_every_image_or_none_is_erased():
    assert hidden(random_erasing, probability=1.0).any(axis=(1, 2)).all()
    assert not hidden(random_erasing, probability=0.0).any()
    # Nothing of the whole area but the whole image itself ever fits.
    assert not hidden(random_erasing, probability=1.0, area=(1.0, 1.0), aspect=0.3)[:20].all()


@pytest.mark.parametrize(
    ("fill", "want"), [(-1, -1), (1.0, 1), (IMAGENET_MEAN, [-0.0196, -0.0431, -0.1059])]
)
def test_constant_fillings(fill, want):
    out = random_erasing(BATCH, jax.random.key(0), fill=fill)["image"]
    changed = np.asarray(out)[np.asarray(out[..., 0]) != 7]
    np.testing.assert_allclose(changed, np.broadcast_to(want, changed.shape), atol=1e-4)


def test_random_fillings():
    out = np.asarray(random_erasing(BATCH, jax.random.key(0), probability=1.0)["image"])
    values = out[out != 7]
    counts, _ = np.histogram(values, 20, (-1, 1))
    assert counts.sum() == values.size and np.ptp(counts) < 0.05 * counts.mean()
    # Neighbours, channels and images know nothing of each other.
    first = np.asarray(
        cutout({"image": jnp.zeros((40, 64, 64, 3))}, jax.random.key(1), size=1.0, fill="pixels")[
            "image"
        ]
    )
    first = np.where(first == 0, np.nan, first)
    for a, b in (
        (first[:, 1:], first[:, :-1]),
        (first[:, :, 1:], first[:, :, :-1]),
        (first[..., 1:], first[..., :-1]),
        (first[1:], first[:-1]),
    ):
        both = np.isfinite(a) & np.isfinite(b)
        assert abs(np.corrcoef(a[both], b[both])[0, 1]) < 0.015
    flat = np.asarray(
        random_erasing(BATCH, jax.random.key(0), fill="colour", probability=1.0)["image"]
    )
    colours = {tuple(np.unique(image[image[..., 0] != 7], axis=0).ravel()) for image in flat}
    assert len(colours) == B and all(len(c) == 3 and np.abs(c).max() <= 1 for c in colours)


def test_colours_are_of_all_hues_and_levels():
    out = random_erasing(BATCH, jax.random.key(0), fill="colour", probability=1.0)["image"]
    colours = np.stack([image[image[..., 0] != 7][0] for image in np.asarray(out)])
    assert np.all(np.abs(colours.mean(axis=0)) < 0.15) and np.all(colours.std(axis=0) > 0.5)
    assert np.all(np.abs(np.corrcoef(colours.T) - np.eye(3)) < 0.25)


def test_cutout_is_a_square_around_any_pixel_that_may_stick_out():
    changed = hidden(cutout, size=0.35)  # 11 pixels
    places = np.array([rectangle(c) for c in changed])
    inside = (places[:, 2] == 11) & (places[:, 3] == 11)
    expected = (Y - 10) / Y * (X - 10) / X
    assert abs(inside.mean() - expected) < 0.1 and places[:, 2:].max() == 11
    assert places[:, 2:].min(axis=0).tolist() == [6, 6]
    # All four edges cut squares, down to the half with the centre.
    for axis, size in enumerate((Y, X)):
        start, length = places[:, axis], places[:, axis + 2]
        assert length[start == 0].min() == length[start + length == size].min() == 6
    # Every pixel is the centre equally often.
    full = places[:, 2] == 11
    assert np.ptp(places[full, 0]) == Y - 11
    assert not hidden(cutout, size=0.0).any()


def test_hide_and_seek_hides_whole_cells():
    changed = hidden(hide_and_seek, grids=(4,), probability=0.3)
    row, column = np.arange(Y) * 4 // Y, np.arange(X) * 4 // X
    cells = np.zeros((B, 4, 4))
    for i in range(4):
        for j in range(4):
            cell = changed[:, row == i][:, :, column == j]
            assert np.all(cell.all(axis=(1, 2)) == cell.any(axis=(1, 2)))
            cells[:, i, j] = cell.all(axis=(1, 2))
    assert abs(cells.mean() - 0.3) < 0.03 and cells.mean(0).min() > 0.2
    assert len(np.unique(cells.reshape(B, -1), axis=0)) > 0.9 * B


def test_hide_and_seek_draws_its_grids():
    changed = hidden(hide_and_seek, grids=(0, 1, 5), probability=1.0)
    assert 0.25 < np.mean(~changed.any(axis=(1, 2))) < 0.42
    assert np.all(changed.all(axis=(1, 2)) == changed.any(axis=(1, 2)))
    assert hidden(hide_and_seek, grids=(31,), probability=0.5).any()


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.6, 1.0])
def test_grid_mask_keeps_its_share(ratio):
    changed = hidden(grid_mask, ratio=ratio, probability=1.0)
    assert abs(1 - changed.mean() - (2 * ratio - ratio**2)) < 0.012
    assert 0.7 < hidden(grid_mask, ratio=0.2).any(axis=(1, 2)).mean() < 0.88


def test_grid_mask_is_a_grid_of_squares():
    changed = hidden(
        grid_mask, ratio=0.5, distances=(10 / 31, 10 / 31), rotation=0.0, probability=1.0
    )
    for image in changed[:20]:
        rows, columns = image.any(axis=1), image.any(axis=0)
        np.testing.assert_array_equal(image, rows[:, None] & columns[None])
        np.testing.assert_array_equal(rows[10:], rows[:-10])
        assert 4 <= rows[:10].sum() <= 6
    turned = hidden(
        grid_mask, ratio=0.5, distances=(12 / 31, 12 / 31), rotation=45.0, probability=1.0
    )
    sizes = [
        scipy.ndimage.sum_labels(image, scipy.ndimage.label(image)[0], 1) for image in turned[:5]
    ]
    assert max(sizes) <= 50  # a square of 6 x 6, wherever its pixels fall
    straight = [np.array_equal(i, i.any(1)[:, None] & i.any(0)[None]) for i in turned]
    assert np.mean(straight) < 0.1


@pytest.mark.parametrize("name", ALL)
def test_same_key_same_result_compiled_or_not(name):
    small = {"image": BATCH["image"][:6]}
    key, change = jax.random.key(2), functools.partial(ALL[name], fill="pixels")
    plain = change(small, key)["image"]
    np.testing.assert_allclose(jax.jit(change)(small, key)["image"], plain, atol=1e-6)
    both = jax.vmap(lambda k: change(small, k)["image"])(jnp.stack([key, jax.random.key(3)]))
    np.testing.assert_allclose(both[0], plain, atol=1e-6)
    assert np.any(both[0] != both[1])
    assert len({image.tobytes() for image in np.asarray(plain)}) > 2


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (random_erasing, {"area": (-0.1, 0.4)}, r"random_erasing: area=\(-0.1, 0.4\) must be two"),
        (random_erasing, {"area": (0.02, 1.4)}, r"random_erasing: area=\(0.02, 1.4\) must be two"),
        (random_erasing, {"probability": 1.1}, "random_erasing: probability holds 1.1, outside"),
        (random_erasing, {"aspect": 0.0}, r"aspect holds 0, outside \(0, 1\]"),
        (random_erasing, {"fill": "mean"}, "random_erasing: unknown fill='mean'; pass 'pixels'"),
        (cutout, {"fill": (0.0, 1.0)}, r"cutout: fill=\(0.0, 1.0\) has 2 values .* or 3"),
        (cutout, {"size": 1.5}, "cutout: size holds 1.5"),
        (hide_and_seek, {"grids": (32,)}, r"grids=\(32,\) must be cells along a side, 0 to 31"),
        (hide_and_seek, {"probability": -1.0}, "hide_and_seek: probability holds -1"),
        (grid_mask, {"ratio": 1.2}, "grid_mask: ratio holds 1.2"),
        (grid_mask, {"distances": (0.5, 1.5)}, r"grid_mask: distances=\(0.5, 1.5\) must be"),
    ],
)
def test_options_out_of_range_are_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        change(BATCH, jax.random.key(0), **options)
