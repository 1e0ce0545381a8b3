"""Anchors: the boxes and points of a grid that detectors start from."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def anchor_shapes(
    sizes: Sequence[float | int], ratios: Sequence[float | int]
) -> Float[Array, "A 2"]:
    """Width and height of an anchor for every pair of a ratio and a size.

    w = size / sqrt(ratio),  h = size sqrt(ratio)

    Args:
      sizes: square roots of the areas, in pixels.
      ratios: heights over widths.

    Returns:
      A = len(ratios) len(sizes) shapes in torchvision's order, all sizes of the first
      ratio first. Its checkpoints were trained with half widths and heights rounded to
      whole pixels, `2 * jnp.round(shapes / 2)`.

    Raises:
      ValueError: none, or one that is not positive.

    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.1 (arXiv:1506.01497).
    """
    for name, values in (("sizes", sizes), ("ratios", ratios)):
        if not len(values) or min(values) <= 0:
            raise ValueError(f"anchor_shapes: {name}={tuple(values)} must be positive numbers")
    roots, sides = np.sqrt(np.asarray(ratios))[:, None], np.asarray(sizes)[None, :]
    shapes = np.stack([sides / roots, sides * roots], axis=-1)
    return jnp.asarray(shapes.reshape(-1, 2), jnp.float32)


def grid_anchors(
    shapes: Float[Array, "A 2"],
    grid: tuple[int, int],
    stride: float | int,
    *,
    centred_in_cell: bool,
) -> Float[Array, "Y X A 4"]:
    """Anchors of all shapes around one point of every cell of a grid.

    Args:
      shapes: (width, height) in pixels, see `anchor_shapes`.
      grid: rows and columns of cells.
      stride: side of a cell in pixels.
      centred_in_cell: True puts them around the centres of the cells; False around
        their upper left corners, as torchvision and Detectron2 do.

    Returns:
      xyxy in pixels; many leave the image.

    Raises:
      ValueError: a grid without cells, or a stride that is not positive.

    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.1 (arXiv:1506.01497).
    """
    points = _points("grid_anchors", grid, stride, 0.5 if centred_in_cell else 0.0)
    half, points = shapes[None, None] / 2, points[:, :, None]
    return jnp.concatenate([points - half, points + half], axis=-1)


def grid_points(grid: tuple[int, int], stride: float | int) -> Float[Array, "Y X 2"]:
    """(x, y) in pixels of the centre of every cell of a grid.

    out[y, x] = (stride (x + 1/2), stride (y + 1/2))

    Args:
      grid: rows and columns of cells.
      stride: side of a cell in pixels.

    Raises:
      ValueError: a grid without cells, or a stride that is not positive.

    Source: Tian et al. 2019, "FCOS", section 3.1 (arXiv:1904.01355).
    """
    return _points("grid_points", grid, stride, 0.5)


def _points(
    function: str, grid: tuple[int, int], stride: float | int, place: float
) -> Float[Array, "Y X 2"]:
    """One point of every cell, at `place` between its upper left and lower right corner."""
    if min(grid) < 1 or stride <= 0:
        raise ValueError(f"{function}: grid={grid} and stride={stride} must be positive")
    y, x = (stride * (jnp.arange(count, dtype=jnp.float32) + place) for count in grid)
    return jnp.stack(jnp.meshgrid(x, y), axis=-1)
