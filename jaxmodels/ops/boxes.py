"""Boxes in images: their formats, areas, and what is wrong with bad ones.

A box is xyxy, (left, top, right, bottom) in pixels, unless a name says otherwise. Pixel
(y, x) covers the square from (x, y) to (x + 1, y + 1), so the box of a whole image is
(0, 0, columns, rows), and a box's width is right - left.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num


def xyxy_to_cxcywh(boxes: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """Centre, width and height of boxes given by two corners."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def cxcywh_to_xyxy(boxes_cxcywh: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """Two corners of boxes given by centre, width and height."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_xywh(boxes: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """Upper left corner, width and height (COCO's format) of boxes given by two corners."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([low, high - low], axis=-1)


def xywh_to_xyxy(boxes_xywh: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """Two corners of boxes given by upper left corner, width and height (COCO's format)."""
    low, size = boxes_xywh[..., :2], boxes_xywh[..., 2:]
    return jnp.concatenate([low, low + size], axis=-1)


def box_area(boxes: Float[Array, "*B 4"]) -> Float[Array, "*B"]:
    """Width times height, in square pixels; zero for a box of negative width or height."""
    size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return size[..., 0] * size[..., 1]


def clip_boxes(
    boxes: Float[Array, "*B 4"], size: tuple[int, int] | Num[Array, "2"]
) -> Float[Array, "*B 4"]:
    """The parts of boxes inside the image; one that lies outside becomes empty, on the border.

    Args:
      boxes: corners anywhere.
      size: rows and columns of the image, one for all boxes; use `vmap` for a batch
        of images that differ in size.
    """
    rows, columns = size
    limits = (columns, rows, columns, rows)
    parts = [jnp.clip(boxes[..., i], 0, limit) for i, limit in enumerate(limits)]
    return jnp.stack(parts, axis=-1)


def require_boxes(
    function: str, name: str, boxes: ArrayLike, size: tuple[int, int] | None = None
) -> None:
    """Raises unless all boxes are finite, of no negative size and, given a size, in the image.

    Empty boxes pass: they fill places without an object. Inside a compiled function
    there are no values to look at and only the shape is checked; called with concrete
    arrays (JAX's or NumPy's), all is.

    Args:
      function, name: the caller and its argument, for the message.
      boxes: (..., 4), xyxy.
      size: rows and columns of the image, or None.

    Raises:
      ValueError: naming the function, the argument, the first bad box and the remedy.
    """
    if not np.shape(boxes) or np.shape(boxes)[-1] != 4:
        raise ValueError(f"{function}: {name} {np.shape(boxes)} must be (..., 4), xyxy")
    if isinstance(boxes, jax.core.Tracer):
        return
    found = np.asarray(boxes)
    low, high = found[..., :2], found[..., 2:]
    faults = {
        "is not finite; drop it": ~np.isfinite(found).all(-1),
        "has a negative size; boxes are xyxy, see xywh_to_xyxy": (high < low).any(-1),
    }
    if size is not None:
        outside = (low < 0).any(-1) | (high > np.asarray(size)[::-1]).any(-1)
        faults[f"leaves the image of {size[0]} x {size[1]} pixels; see clip_boxes"] = outside
    for fault, bad in faults.items():
        if bad.any():
            place = np.unravel_index(np.argmax(bad), bad.shape)
            values = ", ".join(f"{value:g}" for value in found[place])
            where = f"[{', '.join(map(str, place))}]" if place else ""
            raise ValueError(f"{function}: {name}{where} = ({values}) {fault}")
