"""Augmentations by name, one after another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxmodels.data.augmentation.checks import MAPS, Batch
from jaxmodels.data.augmentation.colour import colour
from jaxmodels.data.augmentation.erasing import cutout, grid_mask, hide_and_seek, random_erasing
from jaxmodels.data.augmentation.geometry import (
    affine,
    flip_horizontal,
    flip_vertical,
    resized_crop,
)
from jaxmodels.data.augmentation.mixing import cutmix, mixup, soft_labels
from jaxmodels.ops.mesh_axes import for_each_token
from jaxmodels.ops.stored import stored

AUGMENTATIONS: dict[str, Callable[..., Batch]] = {
    "flip": flip_horizontal,
    "flip_vertical": flip_vertical,
    "crop": resized_crop,
    "affine": affine,
    "colour": colour,
    "erasing": random_erasing,
    "cutout": cutout,
    "hide_and_seek": hide_and_seek,
    "grid_mask": grid_mask,
    "mixup": mixup,
    "cutmix": cutmix,
}
# Read each pixel once.
_JOINING = {"erasing", "cutout", "hide_and_seek", "grid_mask"}
_MIXING = {"mixup", "cutmix"}


def augment(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    names: Sequence[str],
    *,
    num_classes: int | None = None,
) -> Batch:
    """Applies augmentations with their defaults, in the order of their names.

    For other options call them by themselves, each compiled by itself: written
    one after another into one program, XLA on a CPU computes the first ones
    again for every pixel that a later one gathers, and takes four times as long.
    Here images are stored between them, but before those that only hide.

    Args:
      batch: see each of them.
      key: of all draws.
      names: keys of `AUGMENTATIONS`.
      num_classes: for "mixup" and "cutmix", unless the labels are soft.

    Returns:
      The changed batch; the same for no names.

    Raises:
      ValueError: unknown name, or what each of them raises.
    """
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise ValueError(
            f"augment: unknown name {unknown[0]!r}; choose among {sorted(AUGMENTATIONS)}"
        )
    out = {name: jnp.asarray(value) for name, value in batch.items()}
    if not names:
        return out
    if _MIXING & set(names) and (labels := soft_labels("augment", out, num_classes)) is not None:
        out["label"] = labels
    for number, name in enumerate(names):
        if number and name not in _JOINING:
            out = _fenced(out)
        out = AUGMENTATIONS[name](out, jax.random.fold_in(key, number))
    return _fenced(out)


def _fenced(out: Batch) -> Batch:
    """The batch, whose images and maps what comes later cannot compute again."""
    maps = {name: for_each_token(stored, out[name]) for name in ("image", *MAPS) if name in out}
    return jax.lax.optimization_barrier({**out, **maps})
