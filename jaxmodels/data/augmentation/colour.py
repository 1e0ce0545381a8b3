"""Brightness, contrast, saturation, hue and grey."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmodels.data.augmentation.checks import (
    Batch,
    checked_images,
    per_image,
    uniform,
)
from jaxmodels.ops.checks import require_within

# ITU-R BT.601, which Pillow's conversion to grey follows.
_LUMA = (0.299, 0.587, 0.114)


def colour(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    grey: float = 0.0,
) -> Batch:
    """Changes brightness, contrast, saturation and hue of each image, in this order.

    A factor is uniform in [max(0, 1 - s), 1 + s] for the strength s, a turn of
    the hue in [-hue, hue]. torchvision draws the order too; here it is fixed,
    so that all is one pass over memory after the one that finds the mean.

    Args:
      batch: "image"; grey images have no saturation and no hue to change.
      key: of the factors, four an image.
      brightness, contrast, saturation: strengths, not negative; 0 changes nothing.
      hue: largest turn, as a share of the colour circle; at most 1/2.
      grey: probability of an image to lose its colour.

    Returns:
      The batch with the images replaced.

    Raises:
      ValueError: wrong shapes, or an option out of its range.

    Source: Krizhevsky et al. 2012 and Howard 2013 (arXiv:1312.5402), as
    torchvision's ColorJitter and RandomGrayscale define it.
    """
    function = "colour"
    images = checked_images(function, batch)
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, strength in strengths.items():
        require_within(function, name, strength, 0, 1e3)
    require_within(function, "hue", hue, 0, 0.5)
    require_within(function, "grey", grey, 0, 1)
    *keys, for_hue, for_grey = jax.random.split(key, 5)
    size = (len(images),)
    factors = {
        name: uniform(k, size, (max(0.0, 1 - strength), 1 + strength))
        for k, (name, strength) in zip(keys, strengths.items(), strict=True)
    }
    if brightness:
        images = adjust_brightness(images, factors["brightness"])
    if contrast:
        images = adjust_contrast(images, factors["contrast"])
    if images.shape[-1] == 3:
        if saturation:
            images = adjust_saturation(images, factors["saturation"])
        if hue:
            images = adjust_hue(images, uniform(for_hue, size, (-hue, hue)))
        if grey:
            chosen = jax.random.bernoulli(for_grey, grey, size)
            images = adjust_saturation(images, jnp.where(chosen, 0.0, 1.0))
    return {**batch, "image": images}


def adjust_brightness(
    images: Float[Array, "B Y X C"], factor: Float[Array, "B"]
) -> Float[Array, "B Y X C"]:
    """factor * image, with black 0 and white 1, clipped."""
    return _blend(images, jnp.array(-1.0), factor)


def adjust_contrast(
    images: Float[Array, "B Y X C"], factor: Float[Array, "B"]
) -> Float[Array, "B Y X C"]:
    """factor * image + (1 - factor) * the mean of its grey version, clipped."""
    # Lines first: XLA sums them as they lie in memory, channels and all.
    lines = images.reshape(*images.shape[:2], -1).mean(axis=1)
    means = lines.reshape(len(images), 1, *images.shape[2:]).mean(axis=2, keepdims=True)
    return _blend(images, luma(means), factor)


def adjust_saturation(
    images: Float[Array, "B Y X C"], factor: Float[Array, "B"]
) -> Float[Array, "B Y X C"]:
    """factor * image + (1 - factor) * its grey version, clipped."""
    return _blend(images, luma(images), factor)


def luma(images: Float[Array, "*B Y X C"]) -> Float[Array, "*B Y X 1"]:
    """The grey version: 0.299 red + 0.587 green + 0.114 blue; grey images are their own."""
    if images.shape[-1] == 1:
        return images
    return sum(weight * images[..., i : i + 1] for i, weight in enumerate(_LUMA))


def _blend(images, other, factor):
    other = jnp.broadcast_to(other, images.shape)
    return jnp.clip(
        other + per_image(factor.astype(images.dtype), images) * (images - other), -1, 1
    )


def adjust_hue(images: Float[Array, "B Y X 3"], turn: Float[Array, "B"]) -> Float[Array, "B Y X 3"]:
    """Turns the hue by a share of the colour circle; largest and smallest channel stay.

    With the hue h in [0, 6), V the largest channel and D its distance to the
    smallest, channel n = 5, 3, 1 of red, green, blue is V - D clip(2 - |k - 2|, 0, 1)
    where k = (n + h) mod 6: Smith's HSV hexagon without its six cases.
    """
    red, green, blue = (images[..., i] for i in range(3))
    most = jnp.maximum(jnp.maximum(red, green), blue)
    spread = most - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1 / jnp.where(spread == 0, 1, spread)
    hue = jnp.where(
        most == red,
        (green - blue) * scale,
        jnp.where(most == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue = hue + 6 * per_image(turn.astype(images.dtype), hue)
    # Plane by plane up to here, channel by channel below: fused, it takes three times as long.
    k = hue[..., None] + jnp.array([5, 3, 1], images.dtype)[None, None, None]
    k = k - 6 * jnp.floor(k / 6)
    return most[..., None] - spread[..., None] * jnp.clip(2 - jnp.abs(k - 2), 0, 1)
