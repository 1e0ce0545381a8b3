"""Hiding parts of images: random erasing, Cutout, Hide-and-Seek, GridMask.

Labels, masks and boxes stay: what is hidden is still there.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxmodels.data.augmentation.checks import Batch, check_range, checked_images, uniform
from jaxmodels.ops.checks import require_within
from jaxmodels.ops.stored import stored

IMAGENET_MEAN = tuple(level / 127.5 - 1 for level in (125, 122, 114))
# A rectangle of 0.4 of the area fits in one of eight draws: 64 leave one image in 5,000 whole.
_DRAWS = 64

Fill = str | float | int | tuple[float | int, ...]


def random_erasing(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: float = 0.3,
    fill: Fill = "pixels",
) -> Batch:
    """Replaces a rectangle of an image by noise or a colour.

    The paper's algorithm: area uniform in `area`, height over width uniform in
    [aspect, 1 / aspect], corner uniform in the image, until it fits; at most 64
    times, after which the image stays whole.

    Args:
      batch: "image"; the rest is kept.
      key: of the choice, the rectangles and what fills them.
      probability: of an image to be erased.
      area: smallest and largest share of the image (s_l, s_h).
      aspect: smallest ratio r_1, in (0, 1].
      fill: "pixels", uniform noise for every value (the paper's RE-R); "colour",
        one random colour a rectangle; or a constant: `IMAGENET_MEAN` (RE-M),
        -1 (RE-0), 1 (RE-255), or any value or one for each channel.

    Returns:
      The batch with the images replaced.

    Raises:
      ValueError: wrong shapes, shares outside [0, 1], another fill.

    Source: Zhong et al. 2017, "Random Erasing Data Augmentation", algorithm 1
    and section 4.2.2 (arXiv:1708.04896).
    """
    function = "random_erasing"
    images = checked_images(function, batch)
    require_within(function, "probability", probability, 0, 1)
    check_range(function, "area", area, 0, 1)
    require_within(function, "aspect", aspect, 0, 1, open_low=True)
    for_choice, for_place, for_fill = jax.random.split(key, 3)
    top, left, height, width = _rectangles(for_place, images.shape, area, aspect)
    chosen = jax.random.bernoulli(for_choice, probability, (len(images),))
    hidden = _inside(images, top, left, jnp.where(chosen, height, 0), width)
    return _hide(function, batch, images, hidden, fill, for_fill)


def cutout(
    batch: Mapping[str, Any], key: Key[Array, ""], *, size: float = 0.5, fill: Fill = 0.0
) -> Batch:
    """Hides a square around a random pixel; it may stick out of the image.

    Args:
      batch: "image"; the rest is kept.
      key: of the places.
      size: side of the square as a share of the image's shorter side, rounded
        to pixels; the paper takes 16 of 32 for CIFAR-10 and 8 of 32 for CIFAR-100.
      fill: as in `random_erasing`; the paper takes the mean.

    Returns:
      The batch with the images replaced.

    Raises:
      ValueError: wrong shapes, a size outside [0, 1], another fill.

    Source: DeVries and Taylor 2017, "Improved Regularization of Convolutional
    Neural Networks with Cutout", section 3.2 (arXiv:1708.04552).
    """
    function = "cutout"
    images = checked_images(function, batch)
    require_within(function, "size", size, 0, 1)
    count, rows, columns, _ = images.shape
    side = round(size * min(rows, columns))
    for_y, for_x, for_fill = jax.random.split(key, 3)
    top = jax.random.randint(for_y, (count,), 0, rows) - side // 2
    left = jax.random.randint(for_x, (count,), 0, columns) - side // 2
    hidden = _inside(images, top, left, side, side)
    return _hide(function, batch, images, hidden, fill, for_fill)


def hide_and_seek(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    grids: tuple[int, ...] = (0, 4, 5, 7, 14),
    probability: float = 0.5,
    fill: Fill = 0.0,
) -> Batch:
    """Divides an image into a grid and hides each cell with some probability.

    Args:
      batch: "image"; the rest is kept.
      key: of the grids and cells.
      grids: numbers of cells along a side, one of which is drawn for each image;
        0 hides nothing. The paper draws cells of 16, 32, 44 and 56 of 224 pixels
        or nothing.
      probability: of a cell to be hidden.
      fill: as in `random_erasing`; the paper takes the mean of the training set.

    Returns:
      The batch with the images replaced.

    Raises:
      ValueError: wrong shapes, a grid finer than the image, a probability
        outside [0, 1], another fill.

    Source: Singh and Lee 2017, "Hide-and-Seek", section 3.1 (arXiv:1704.04232).
    """
    function = "hide_and_seek"
    images = checked_images(function, batch)
    require_within(function, "probability", probability, 0, 1)
    count, rows, columns, _ = images.shape
    if not grids or not all(0 <= cells <= min(rows, columns) for cells in grids):
        raise ValueError(
            f"{function}: grids={grids} must be cells along a side, 0 to {min(rows, columns)} for "
            f"image {images.shape}"
        )
    for_grid, for_cells, for_fill = jax.random.split(key, 3)
    cells = jax.random.choice(for_grid, jnp.array(grids), (count,))
    finest = max(max(grids), 1)
    off = jax.random.bernoulli(for_cells, probability, (count, finest, finest))
    off &= (cells > 0)[:, None, None]
    row, column = (jnp.arange(size)[None] * cells[:, None] // size for size in (rows, columns))
    # First the little that columns gather, of which rows then take whole lines.
    lines = stored(jax.vmap(lambda off, column: off[:, column])(off, column))
    hidden = jax.vmap(lambda lines, row: lines[row])(lines, row)
    return _hide(function, batch, images, hidden, fill, for_fill)


def grid_mask(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    ratio: float = 0.6,
    distances: tuple[float, float] = (96 / 224, 1.0),
    rotation: float = 45.0,
    probability: float = 0.8,
    fill: Fill = 0.0,
) -> Batch:
    """Hides squares on a regular grid, shifted and turned at random.

    In units of side d, a square of side (1 - ratio) d is hidden, so that a share
    of 2 ratio - ratio^2 is kept.

    Args:
      batch: "image"; the rest is kept.
      key: of the choice and the grids.
      ratio: r, how much of a unit's side is kept.
      distances: smallest and largest d, as a share of the image's shorter side;
        the paper draws 96 to 224 of 224 pixels.
      rotation: largest angle of the grid in degrees, either way.
      probability: of an image to be masked. The paper raises it from 0 to 0.8 over
        the training.
      fill: as in `random_erasing`; the paper takes zeros after normalisation.

    Returns:
      The batch with the images replaced.

    Raises:
      ValueError: wrong shapes, shares outside [0, 1], another fill.

    Source: Chen et al. 2020, "GridMask Data Augmentation", section 3
    (arXiv:2001.04086).
    """
    function = "grid_mask"
    images = checked_images(function, batch)
    for name, value in (("ratio", ratio), ("probability", probability)):
        require_within(function, name, value, 0, 1)
    check_range(function, "distances", distances, 1e-6, 1)
    require_within(function, "rotation", rotation, 0, 180)
    count, rows, columns, _ = images.shape
    keys = jax.random.split(key, 5)
    distance = uniform(keys[0], (count, 1, 1), distances) * min(rows, columns)
    angle = jnp.deg2rad(uniform(keys[1], (count, 1, 1), (-rotation, rotation)))
    shift = jax.random.uniform(keys[2], (2, count, 1, 1))
    y = (jnp.arange(rows) + 0.5 - rows / 2)[None, :, None]
    x = (jnp.arange(columns) + 0.5 - columns / 2)[None, None, :]
    cos, sin = jnp.cos(angle) / distance, jnp.sin(angle) / distance
    units = (cos * x - sin * y + shift[0], sin * x + cos * y + shift[1])
    # Half of the kept part would do on either side: the shift is uniform.
    across, down = (u - jnp.floor(u) < 1 - ratio for u in units)
    chosen = jax.random.bernoulli(keys[3], probability, (count,))
    hidden = across & down & chosen[:, None, None]
    return _hide(function, batch, images, hidden, fill, keys[4])


def _rectangles(key, shape, area, aspect) -> tuple[Array, Array, Array, Array]:
    """Top, left, height and width in pixels; of height 0 where no draw fitted."""
    count, rows, columns, _ = shape
    keys = jax.random.split(key, 4)
    pixels = rows * columns * uniform(keys[0], (count, _DRAWS), area)
    ratio = uniform(keys[1], (count, _DRAWS), (aspect, 1 / aspect))
    height, width = jnp.round(jnp.sqrt(pixels * ratio)), jnp.round(jnp.sqrt(pixels / ratio))
    top = jax.random.randint(keys[2], (count, _DRAWS), 0, rows)
    left = jax.random.randint(keys[3], (count, _DRAWS), 0, columns)
    fits = (top + height <= rows) & (left + width <= columns)
    height = jnp.where(fits, height, 0)
    first = jnp.argmax(fits, axis=1)[:, None]
    return tuple(jnp.take_along_axis(x, first, 1)[:, 0] for x in (top, left, height, width))


def _inside(images, top, left, height, width) -> Bool[Array, "B Y X"]:
    rows, columns = (jnp.arange(size)[None] for size in images.shape[1:3])

    def between(places, start, length):
        start, length = (jnp.broadcast_to(x, len(images))[:, None] for x in (start, length))
        return (places >= start) & (places < start + length)

    return between(rows, top, height)[:, :, None] & between(columns, left, width)[:, None, :]


def _hide(function, batch, images, hidden: Bool[Array, "B Y X"], fill: Fill, key) -> Batch:
    values = _filling(function, images, fill, key)
    return {**batch, "image": jnp.where(hidden[..., None], values, images)}


def _filling(function: str, images: Array, fill: Fill, key) -> Float[Array, "#B #Y #X #C"]:
    count, _, _, channels = images.shape
    if isinstance(fill, str):
        if fill == "pixels":
            return _noise(key, images.shape).astype(images.dtype)
        if fill == "colour":
            return jax.random.uniform(key, (count, 1, 1, channels), images.dtype, -1, 1)
        raise ValueError(
            f"{function}: unknown fill={fill!r}; pass 'pixels', 'colour', a value or one a channel"
        )
    values = jnp.asarray(fill, images.dtype).reshape(-1)
    if values.size not in (1, channels):
        raise ValueError(
            f"{function}: fill={fill} has {values.size} values for image {images.shape}; pass one, "
            f"or {channels}"
        )
    return values[None, None, None]


def _noise(key, shape) -> Float[Array, "B Y X C"]:
    """Uniform in [-1, 1): a hash of the value's number and a word drawn for its image.

    On a CPU this takes a twentieth of the time of `jax.random.uniform`, and XLA
    fuses it into whatever reads it. The hash is the finaliser of MurmurHash3.
    """
    words = jax.random.bits(key, (shape[0], 2), jnp.uint32)
    numbers = jnp.arange(shape[1] * shape[2] * shape[3], dtype=jnp.uint32).reshape(1, *shape[1:])
    x = numbers * jnp.uint32(0x9E3779B9) + words[:, 0, None, None, None]
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35) + words[:, 1, None, None, None]
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x ^= x >> 15
    # The upper 24 bits, all that a float holds.
    return (x >> 8).astype(jnp.float32) * 2**-23 - 1
