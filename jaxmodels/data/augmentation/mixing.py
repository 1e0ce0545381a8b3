"""Mixup and CutMix: two images become one, and their labels too."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmodels.data.augmentation.checks import Batch, checked_images, per_image
from jaxmodels.ops.checks import require_within


def mixup(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    alpha: float = 0.2,
    num_classes: int | None = None,
) -> Batch:
    """Averages each image with another of the batch, and their labels alike.

    out = w image + (1 - w) partner, w from Beta(alpha, alpha), for each image

    Args:
      batch: "image" and "label", whole (B,) or soft (B, K).
      key: of the partners and weights.
      alpha: above 0; small values leave most images nearly alone.
      num_classes: K, needed for whole labels.

    Returns:
      The batch with images, and labels of shape (B, K), replaced.

    Raises:
      ValueError: wrong shapes, alpha not positive, whole labels without
        num_classes or out of range, or masks or boxes, which have no average.

    Source: Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization",
    section 2 (arXiv:1710.09412); weights are drawn for each image, not each batch.
    """
    function = "mixup"
    images = checked_images(function, batch)
    _refuse(function, batch, ("mask", "instances", "boxes"))
    weight, partner, _ = _draw(function, key, alpha, len(images))
    labels = soft_labels(function, batch, num_classes)
    out = {**batch, "image": _average(images, images[partner], weight)}
    return out if labels is None else {**out, "label": _average(labels, labels[partner], weight)}


def cutmix(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    alpha: float = 1.0,
    num_classes: int | None = None,
) -> Batch:
    """Pastes a rectangle of another image of the batch; labels mix by area.

    The rectangle has the image's proportions and a share 1 - w of its area, w from
    Beta(alpha, alpha), around a random point; what sticks out is lost, and the
    labels are mixed by what is left.

    Args:
      batch: "image" and "label", whole (B,) or soft (B, K), or "mask", or both.
      key: of the partners and rectangles.
      alpha: above 0; 1 makes w uniform.
      num_classes: K, needed for whole labels.

    Returns:
      The batch with images, masks, and labels of shape (B, K), replaced.

    Raises:
      ValueError: wrong shapes, alpha not positive, whole labels without
        num_classes or out of range, or boxes, which a paste may cut to any shape.

    Source: Yun et al. 2019, "CutMix", section 3.1 (arXiv:1905.04899).
    """
    function = "cutmix"
    images = checked_images(function, batch)
    _refuse(function, batch, ("instances", "boxes"))
    weight, partner, for_place = _draw(function, key, alpha, len(images))
    labels = soft_labels(function, batch, num_classes)
    side = jnp.sqrt(1 - weight)
    inside = [
        _span(k, side, size)
        for k, size in zip(jax.random.split(for_place), images.shape[1:3], strict=True)
    ]
    pasted = inside[0][:, :, None] & inside[1][:, None, :]
    out = {**batch, "image": jnp.where(pasted[..., None], images[partner], images)}
    if "mask" in batch:
        mask = jnp.asarray(batch["mask"])
        out["mask"] = jnp.where(pasted, mask[partner], mask)
    if labels is not None:
        kept = 1 - pasted.mean(axis=(1, 2))
        out["label"] = _average(labels, labels[partner], kept)
    return out


def _draw(function, key, alpha, count) -> tuple[Array, Array, Array]:
    """A weight and a partner for each image, and a key."""
    require_within(function, "alpha", alpha, 0, 1e6, open_low=True)
    for_weight, for_partner, rest = jax.random.split(key, 3)
    weight = jax.random.beta(for_weight, alpha, alpha, (count,))
    return weight, jax.random.permutation(for_partner, count), rest


def _span(key, side: Float[Array, "B"], size: int) -> Array:
    """(B, size): which places along an axis are in the rectangle."""
    length = jnp.round(side * size).astype(jnp.int32)
    start = jax.random.randint(key, side.shape, 0, size) - length // 2
    places = jnp.arange(size)[None]
    return (places >= start[:, None]) & (places < (start + length)[:, None])


def _average(ours, theirs, weight: Float[Array, "B"]):
    return theirs + per_image(weight.astype(ours.dtype), ours) * (ours - theirs)


def _refuse(function, batch, names) -> None:
    found = [name for name in names if name in batch]
    if found:
        raise ValueError(
            f"{function}: cannot mix {' and '.join(found)}; leave them out of the batch"
        )


def soft_labels(
    function: str, batch: Mapping[str, Any], num_classes: int | None
) -> Float[Array, "B K"] | None:
    """The batch's labels as shares of classes; None where it has a mask instead."""
    if "label" not in batch:
        if "mask" in batch:
            return None
        raise ValueError(f"{function}: the batch holds {sorted(batch)}; it needs 'label'")
    labels, count = jnp.asarray(batch["label"]), len(batch["image"])
    if labels.ndim == 2 and len(labels) == count:
        return labels
    if labels.shape != (count,) or num_classes is None:
        raise ValueError(
            f"{function}: label {labels.shape} with num_classes={num_classes}; give soft labels "
            f"(B, K), or whole ones (B,) = ({count},) and num_classes"
        )
    require_within(function, "label", labels, 0, num_classes - 1)
    return jax.nn.one_hot(labels, num_classes)
