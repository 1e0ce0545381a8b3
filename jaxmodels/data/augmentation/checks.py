"""What every augmentation asks of the batch it is given."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Batch = dict[str, Any]
# What has a value for each pixel of the image.
MAPS = ("mask", "instances")


def checked_images(function: str, batch: Mapping[str, Any]) -> Float[Array, "B Y X C"]:
    """The batch's images, if they and all that belongs to them have the promised shapes.

    Raises:
      ValueError: naming the function, the key of the batch and its shape.
    """
    if "image" not in batch:
        raise ValueError(f"{function}: the batch holds {sorted(batch)}; it needs 'image'")
    images = jnp.asarray(batch["image"])
    shape = images.shape
    if len(shape) != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{function}: image of shape {shape} and type {images.dtype}; give floats in [-1, 1] "
            "of shape (B, Y, X, C)"
        )
    if shape[3] not in (1, 3):
        first = "; the channels seem to come first, transpose to (B, Y, X, C)"
        raise ValueError(
            f"{function}: image of shape {shape} must have 1 or 3 channels in its last dimension"
            + (first if shape[1] in (1, 3) else "")
        )
    for name in MAPS:
        if name in batch and batch[name].shape != shape[:3]:
            raise ValueError(
                f"{function}: {name} {batch[name].shape} is of another size than image {shape}; "
                f"give (B, Y, X) = {shape[:3]}"
            )
    return images


def check_range(
    function: str, name: str, bounds: tuple[float, float], low: float | int, high: float | int
) -> None:
    """Raises unless low <= bounds[0] <= bounds[1] <= high."""
    if not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(
            f"{function}: {name}={bounds} must be two numbers in order, from {low:g} to {high:g}"
        )


def per_image(values: Array, like: Array) -> Array:
    """(B,) values, with as many trailing dimensions of one as `like` has."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def uniform(key: jax.Array, shape: tuple[int, ...], bounds: tuple[Any, Any]) -> Array:
    """Draws from [low, high]; a low that is the high gives exactly that."""
    low, high = bounds
    return low + (high - low) * jax.random.uniform(key, shape)
