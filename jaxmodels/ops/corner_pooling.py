"""Corner pooling: evidence for a corner of a box, from all along its sides."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.ops.cumulative import cumulative

# The axis along which a direction looks, and whether it starts at the far end.
_DIRECTIONS = {"left": (2, True), "right": (2, False), "top": (1, True), "bottom": (1, False)}


def corner_pool(x: Float[Array, "B Y X C"], direction: str) -> Float[Array, "B Y X C"]:
    """The largest value from every pixel to an edge of the image, itself included.

    "left":  out[y, x] = max of x[y, x'] over x' >= x    "right":  over x' <= x
    "top":   out[y, x] = max of x[y', x] over y' >= y    "bottom": over y' <= y

    The names are those of the sides they look for: an object's left side is where its
    topmost pixel, somewhere to the right, becomes visible. The sum of "top" and "left"
    finds top left corners, that of "bottom" and "right" bottom right ones. O(Y X C)
    on a CPU; see `cumulative`.

    Args:
      x: feature maps.
      direction: "left", "right", "top" or "bottom".

    Returns:
      In the shape of x. Where values are equal, they share the gradient.

    Raises:
      ValueError: an unknown direction.

    Source: Law and Deng 2018, "CornerNet: Detecting Objects as Paired Keypoints",
    section 3.3, equations 6 and 7 (arXiv:1808.01244).
    """
    if direction not in _DIRECTIONS:
        raise ValueError(
            f"corner_pool: unknown direction {direction!r}; pass one of {(*_DIRECTIONS,)}"
        )
    axis, reverse = _DIRECTIONS[direction]
    return cumulative(jnp.maximum, x, axis, initial=-jnp.inf, reverse=reverse)
