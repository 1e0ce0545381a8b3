"""Flips, resized crops and affine maps; boxes, masks and instances move along.

Points are (x, y) in pixels with (0, 0) the corner of the first pixel, so the
centre of pixel (row i, column j) is (j + 1/2, i + 1/2), as boxes have it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from jaxmodels.data.augmentation.checks import (
    MAPS,
    Batch,
    check_range,
    checked_images,
    uniform,
)
from jaxmodels.ops.checks import require_within
from jaxmodels.ops.stored import stored

_CROPS = 10
_IGNORED = 255


def flip_horizontal(
    batch: Mapping[str, Any], key: Key[Array, ""], *, probability: float = 0.5
) -> Batch:
    """Mirrors images left to right.

    out[y, x] = image[y, X - 1 - x]

    Args:
      batch: "image", and any of "mask", "instances", "boxes" with "box_labels".
      key: chooses the images.
      probability: of an image to be mirrored.

    Returns:
      The batch with these replaced; other keys are kept.

    Raises:
      ValueError: wrong shapes, or a probability outside [0, 1].
    """
    width = jnp.shape(batch["image"])[2] if "image" in batch else 0
    return _flip("flip_horizontal", batch, key, probability, 2, [[-1.0, 0, width], [0, 1, 0]])


def flip_vertical(
    batch: Mapping[str, Any], key: Key[Array, ""], *, probability: float = 0.5
) -> Batch:
    """Mirrors images top to bottom; all else as `flip_horizontal`."""
    height = jnp.shape(batch["image"])[1] if "image" in batch else 0
    return _flip("flip_vertical", batch, key, probability, 1, [[1.0, 0, 0], [0, -1, height]])


def _flip(function, batch, key, probability, axis, mirrored) -> Batch:
    images = checked_images(function, batch)
    require_within(function, "probability", probability, 0, 1)
    flips = jax.random.bernoulli(key, probability, (len(images),))[:, None]
    places = jnp.arange(images.shape[axis])[None]
    # One gather of whole lines reads half as much as a choice between two images.
    places = jnp.where(flips, places[:, ::-1], places)

    def turn(array):
        # XLA would write columns before rows, and all of it once more in order.
        return stored(_take(array, places, axis))

    same = jnp.array([[1.0, 0, 0], [0, 1, 0]])
    forward = jnp.where(flips[..., None], jnp.array(mirrored)[None], same[None])
    return _moved(batch, turn(images), turn, forward, 0.0)


def resized_crop(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    area: tuple[float, float] = (0.25, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    min_visible: float = 0.1,
) -> Batch:
    """Cuts out a rectangle and scales it up to the size of the image.

    Area and logarithm of the aspect ratio are uniform, the place is uniform
    among those inside. The first of ten draws that fits is taken; if none does,
    the first is cut down to the image. Images are scaled by bilinear
    interpolation within the rectangle, along rows and then columns, so no pixel
    is gathered by itself; masks and instances take the nearest pixel.

    Args:
      batch: "image", and any of "mask", "instances", "boxes" with "box_labels".
      key: of the rectangles, one an image.
      area: smallest and largest share of the image; Szegedy et al. use
        (0.08, 1), too little to know a small object by.
      aspect: smallest and largest width over height.
      min_visible: a box of which a smaller share is left has its label set to -1.

    Returns:
      The batch with these replaced; other keys are kept. Boxes are clipped.

    Raises:
      ValueError: wrong shapes, or ranges out of order or out of (0, 1].

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions", section 6
    (arXiv:1409.4842).
    """
    function = "resized_crop"
    images = checked_images(function, batch)
    check_range(function, "area", area, 1e-6, 1)
    check_range(function, "aspect", aspect, 1e-6, 1e6)
    require_within(function, "min_visible", min_visible, 0, 1)
    top, left, height, width = _rectangles(key, images.shape, area, aspect)
    rows, columns = (
        _positions(start, length, size)
        for start, length, size in zip((top, left), (height, width), images.shape[1:3], strict=True)
    )

    def nearest(array):
        array = _take(array, jnp.round(rows).astype(jnp.int32), 1)
        return _take(array, jnp.round(columns).astype(jnp.int32), 2)

    scale_y, scale_x = images.shape[1] / height, images.shape[2] / width
    zero = jnp.zeros_like(scale_x)
    forward = _matrices([[scale_x, zero, -left * scale_x], [zero, scale_y, -top * scale_y]])
    # Columns first: their gather is the slower one and rows then read whole lines.
    scaled = _interpolate(
        _interpolate(images, columns, left + width - 1, 2), rows, top + height - 1, 1
    )
    return _moved(batch, scaled, nearest, forward, min_visible)


def _rectangles(key, shape, area, aspect) -> tuple[Array, Array, Array, Array]:
    """Top, left, height and width in whole pixels, (B,) each."""
    batch, rows, columns, _ = shape
    for_area, for_aspect, for_y, for_x = jax.random.split(key, 4)
    pixels = rows * columns * uniform(for_area, (batch, _CROPS), area)
    logs = jnp.log(jnp.asarray(aspect))
    ratio = jnp.exp(uniform(for_aspect, (batch, _CROPS), (logs[0], logs[1])))
    height = jnp.maximum(jnp.round(jnp.sqrt(pixels / ratio)), 1)
    width = jnp.maximum(jnp.round(jnp.sqrt(pixels * ratio)), 1)
    fits = (height <= rows) & (width <= columns)
    first = jnp.argmax(fits, axis=1)[:, None]
    height = jnp.minimum(jnp.take_along_axis(height, first, 1)[:, 0], rows)
    width = jnp.minimum(jnp.take_along_axis(width, first, 1)[:, 0], columns)
    top = jnp.floor(jax.random.uniform(for_y, (batch,)) * (rows - height + 1))
    left = jnp.floor(jax.random.uniform(for_x, (batch,)) * (columns - width + 1))
    return top, left, height, width


def _positions(
    start: Float[Array, "B"], length: Float[Array, "B"], size: int
) -> Float[Array, "B S"]:
    """Where each of `size` pixels comes from, in pixels counted from the first's centre."""
    inside = (jnp.arange(size) + 0.5)[None] * (length / size)[:, None] - 0.5
    return start[:, None] + jnp.clip(inside, 0, length[:, None] - 1)


def _take(array: Num[Array, "B ..."], indices: Int[Array, "B S"], axis: int) -> Array:
    return jax.vmap(lambda a, i: jnp.take(a, i, axis - 1, mode="clip"))(array, indices)


def _interpolate(images, positions, last, axis) -> Float[Array, "B Y X C"]:
    low = jnp.floor(positions)
    high = jnp.minimum(low + 1, last[:, None])
    weight = jnp.expand_dims(
        (positions - low).astype(images.dtype), (2, 3) if axis == 1 else (1, 3)
    )
    low, high = (_take(images, i.astype(jnp.int32), axis) for i in (low, high))
    return low + weight * (high - low)


def affine(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    rotation: float = 15.0,
    translation: float = 0.1,
    scale: tuple[float, float] = (0.9, 1.1),
    shear: float = 0.0,
    fill: float = -1.0,
    min_visible: float = 0.1,
) -> Batch:
    """Rotates, shears, scales and shifts images about their centres.

    p' = c + t + s R(angle) [[1, tan(shear)], [0, 1]] (p - c)

    Every output pixel looks up where it came from, bilinearly in images, in
    masks and instances the nearest pixel. Four gathers of whole pixels; on a
    CPU, a gather for each channel or from packed neighbours takes twice as long.

    Args:
      batch: "image", and any of "mask", "instances", "boxes" with "box_labels".
      key: of the maps, one an image.
      rotation: largest angle in degrees either way; positive turns clockwise.
      translation: largest shift either way, as a share of width and height.
      scale: smallest and largest factor, uniform.
      shear: largest angle in degrees either way.
      fill: the value outside of the image; the mask is 255 there (ignored).
      min_visible: a box of which a smaller share is left has its label set to -1.

    Returns:
      The batch with these replaced; other keys are kept. A box becomes the
      smallest upright one around the moved box, clipped.

    Raises:
      ValueError: wrong shapes, or an option out of its range.
    """
    function = "affine"
    images = checked_images(function, batch)
    check_range(function, "scale", scale, 1e-3, 1e3)
    for name, value, most in (
        ("rotation", rotation, 180),
        ("translation", translation, 1),
        ("shear", shear, 89),
        ("min_visible", min_visible, 1),
    ):
        require_within(function, name, value, 0, most)
    forward = _affine_maps(key, images.shape, rotation, translation, scale, shear)
    x, y = _sources(_inverse(forward), images.shape)

    def nearest(array):
        outside = _IGNORED if array is batch.get("mask") else 0
        return jax.vmap(lambda a, i, j: _pixels(a, i, j, outside))(
            array, jnp.round(y), jnp.round(x)
        )

    moved = jax.vmap(functools.partial(_bilinear, fill=fill))(images, y, x)
    return _moved(batch, moved, nearest, forward, min_visible)


def _affine_maps(key, shape, rotation, translation, scale, shear) -> Float[Array, "B 2 3"]:
    batch, rows, columns, _ = shape
    keys = jax.random.split(key, 4)
    angle = jnp.deg2rad(uniform(keys[0], (batch,), (-rotation, rotation)))
    factor = uniform(keys[1], (batch,), scale)
    slope = jnp.tan(jnp.deg2rad(uniform(keys[2], (batch,), (-shear, shear))))
    size = jnp.array([columns, rows], jnp.float32)
    shift = uniform(keys[3], (batch, 2), (-translation, translation)) * size[None]
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    linear = _matrices([[cos, cos * slope - sin], [sin, sin * slope + cos]])
    centre = size / 2
    offset = centre[None] + shift - linear @ centre
    return jnp.concatenate([linear, offset[..., None]], axis=2)


def _matrices(rows: list[list[Array]]) -> Array:
    """(B, 2, n) from entries of shape (B,)."""
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _inverse(forward: Float[Array, "B 2 3"]) -> Float[Array, "B 2 3"]:
    a, b, c, d = (forward[:, i, j] for i in range(2) for j in range(2))
    determinant = a * d - b * c
    linear = _matrices([[d, -b], [-c, a]]) / determinant[:, None, None]
    offset = -jnp.einsum("bij,bj->bi", linear, forward[:, :, 2])
    return jnp.concatenate([linear, offset[..., None]], axis=2)


def _sources(backward: Float[Array, "B 2 3"], shape) -> list[Float[Array, "B Y X"]]:
    """Column and row that each pixel comes from, counted from the first pixel's centre."""
    rows, columns = jnp.arange(shape[1]) + 0.5, jnp.arange(shape[2]) + 0.5
    return [
        m[:, 0, None, None] * columns[None, None]
        + m[:, 1, None, None] * rows[None, :, None]
        + (m[:, 2, None, None] - 0.5)
        for m in (backward[:, 0], backward[:, 1])
    ]


def _pixels(
    array: Num[Array, "Y X *C"],
    y: Float[Array, "Y X"],
    x: Float[Array, "Y X"],
    outside: float | int,
) -> Num[Array, "Y X *C"]:
    """The values at whole rows and columns, `outside` beyond the array."""
    rows, columns, *channels = array.shape
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    place = jnp.clip(y, 0, rows - 1) * columns + jnp.clip(x, 0, columns - 1)
    found = jnp.take(
        array.reshape(rows * columns, *channels), place.astype(jnp.int32), axis=0, mode="clip"
    )
    return jnp.where(inside.reshape(*inside.shape, *(1,) * len(channels)), found, outside)


def _bilinear(image, y, x, fill) -> Float[Array, "Y X C"]:
    low_y, low_x = jnp.floor(y), jnp.floor(x)
    down, right = ((p - low)[..., None].astype(image.dtype) for p, low in ((y, low_y), (x, low_x)))
    top, bottom = (
        (1 - right) * _pixels(image, row, low_x, fill)
        + right * _pixels(image, row, low_x + 1, fill)
        for row in (low_y, low_y + 1)
    )
    return (1 - down) * top + down * bottom


def _moved(
    batch: Mapping[str, Any],
    images: Float[Array, "B Y X C"],
    move: Callable[[Array], Array],
    forward: Float[Array, "B 2 3"],
    min_visible: float,
) -> Batch:
    """The batch with new images, its maps moved and its boxes mapped by `forward`."""
    out = {**batch, "image": images} | {n: move(batch[n]) for n in MAPS if n in batch}
    if "boxes" not in batch:
        return out
    boxes = jnp.asarray(batch["boxes"])
    out["boxes"], seen = _moved_boxes(boxes, forward, images.shape, min_visible)
    if "box_labels" in batch:
        out["box_labels"] = jnp.where(seen, batch["box_labels"], -1)
    if "instances" in batch:
        # Number 0 is no box.
        numbers = jnp.where(seen, jnp.arange(1, seen.shape[1] + 1)[None], 0)
        numbers = jnp.pad(numbers.astype(out["instances"].dtype), ((0, 0), (1, 0)))
        out["instances"] = jax.vmap(jnp.take)(numbers, out["instances"])
    return out


def _moved_boxes(
    boxes: Float[Array, "B N 4"], forward: Float[Array, "B 2 3"], shape, min_visible: float
) -> tuple[Float[Array, "B N 4"], Bool[Array, "B N"]]:
    """The upright hulls of the mapped boxes, clipped, and which of them are left to see."""
    corners = jnp.stack([boxes[..., [0, 0, 2, 2]], boxes[..., [1, 3, 1, 3]]], axis=-1)
    mapped = jnp.einsum("bij,bnkj->bnki", forward[:, :, :2], corners)
    mapped += forward[:, None, None, :, 2]
    low, high = mapped.min(axis=2), mapped.max(axis=2)
    limit = jnp.array([shape[2], shape[1]], boxes.dtype)[None, None]
    clipped_low, clipped_high = jnp.clip(low, 0, limit), jnp.clip(high, 0, limit)
    before = jnp.prod(high - low, axis=-1)
    after = jnp.prod(clipped_high - clipped_low, axis=-1)
    seen = (after > 0) & (after >= min_visible * before)
    return jnp.concatenate([clipped_low, clipped_high], axis=-1), seen
