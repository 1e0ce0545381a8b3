"""Colour changes against Pillow, colorsys and the definitions in float64."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from jaxmodels.data.augmentation import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour,
    luma,
)

LEVELS = np.random.default_rng(0).integers(0, 256, (4, 7, 11, 3), np.uint8)
IMAGES = jnp.asarray(LEVELS / 127.5 - 1, jnp.float32)
FACTORS = jnp.array([0.0, 0.6, 1.0, 1.5])
ENHANCERS = {
    adjust_brightness: ImageEnhance.Brightness,
    adjust_contrast: ImageEnhance.Contrast,
    adjust_saturation: ImageEnhance.Color,
}


@pytest.mark.parametrize("adjust", ENHANCERS)
def test_equals_pillow(adjust):
    got = (jax.jit(adjust)(IMAGES, FACTORS) + 1) * 127.5
    for i, factor in enumerate(FACTORS):
        want = np.asarray(ENHANCERS[adjust](Image.fromarray(LEVELS[i])).enhance(float(factor)))
        # Pillow rounds grey levels and their mean to integers, which factors magnify.
        np.testing.assert_allclose(got[i], want, atol=1.8)


def test_hue_equals_colorsys():
    turns = np.array([-0.5, -0.13, 0.31, 0.5])
    # Greys, primaries and ties of channels are where the hexagon has its corners.
    corners = np.array(np.meshgrid(*[[0.0, 0.5, 1.0]] * 3)).reshape(3, -1).T
    rgb = np.concatenate([np.random.default_rng(1).random((53, 3)), corners])
    images = jnp.asarray(np.tile(rgb * 2 - 1, (4, 1, 1, 1)), jnp.float32)
    got = (np.asarray(jax.jit(adjust_hue)(images, jnp.asarray(turns, jnp.float32))) + 1) / 2
    for i, turn in enumerate(turns):
        for pixel, found in zip(rgb, got[i, 0], strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            np.testing.assert_allclose(found, colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=2e-6)


def test_luma_is_pillows_grey():
    want = np.stack([np.asarray(Image.fromarray(level).convert("L")) for level in LEVELS])
    np.testing.assert_allclose((luma(IMAGES)[..., 0] + 1) * 127.5, want, atol=0.51)
    np.testing.assert_array_equal(luma(IMAGES[..., :1]), IMAGES[..., :1])


def test_factors_are_drawn_for_each_image_within_their_range():
    flat = jnp.full((200, 2, 3, 3), -0.5)  # a quarter of white
    only = {"brightness": 0.4, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    out = colour({"image": flat}, jax.random.key(0), **only)["image"]
    factors = (np.asarray(out[:, 0, 0, 0]) + 1) / 0.5
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4
    assert len(np.unique(factors)) > 190 and np.ptp(out, axis=(1, 2, 3)).max() == 0


def test_grey_takes_the_colour_of_some_and_nothing_else():
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    images = jnp.tile(IMAGES, (50, 1, 1, 1))
    out = colour({"image": images}, jax.random.key(0), grey=0.3, **off)["image"]
    lost = np.ptp(out, axis=-1).max(axis=(1, 2)) < 1e-6
    assert 0.2 < lost.mean() < 0.4
    np.testing.assert_allclose(out[~lost], images[~lost], atol=1e-6)
    np.testing.assert_allclose(out[lost, ..., :1], luma(images)[lost], atol=1e-6)


def test_jit_vmap_keys_and_range():
    batch, key = {"image": IMAGES, "label": jnp.arange(4)}, jax.random.key(0)
    plain, compiled = colour(batch, key), jax.jit(colour)(batch, key)
    np.testing.assert_allclose(plain["image"], compiled["image"], atol=1e-5)
    both = jax.vmap(lambda k: colour(batch, k)["image"])(jnp.stack([key, jax.random.key(1)]))
    np.testing.assert_allclose(both[0], plain["image"], atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 0.01
    assert np.abs(plain["image"]).max() <= 1 + 1e-6
    np.testing.assert_array_equal(plain["label"], batch["label"])


def test_grey_images_have_no_colour_to_change():
    grey = {"image": IMAGES[..., :1]}
    off = {"brightness": 0.0, "contrast": 0.0}
    out = colour(grey, jax.random.key(0), grey=1.0, **off)["image"]
    np.testing.assert_array_equal(out, grey["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hue": 0.6}, r"colour: hue holds 0.6, outside \[0, 0.5\]"),
        ({"contrast": -0.1}, r"colour: contrast holds -0.1, outside \[0, 1000\]"),
        ({"grey": 2.0}, r"colour: grey holds 2, outside \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        colour({"image": IMAGES}, jax.random.key(0), **options)
