"""Image pyramid: the same images in several sizes, to train on and to test with.

Paper    Girshick 2015, "Fast R-CNN" (arXiv:1504.08083), section 2.4, "Scale invariance":
         training draws a scale for each step, as He et al. 2014, "Spatial Pyramid
         Pooling" (arXiv:1406.4729), section 3.1. Testing joins the boxes of all
         scales by suppression, as He et al. 2016 (arXiv:1512.03385), appendix B, or by
         Soft-NMS, Bodla et al. 2017 (arXiv:1704.04503).
Differs  All images of a batch have one scale, so that shapes stay static.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxmodels.models.detection.detector import Batch, Detector
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.nms import class_wise_nms, soft_nms
from jaxmodels.ops.resize import resize

METHODS = ("hard", "linear", "gaussian")


def resize_batch(batch: Batch, scale: float) -> Batch:
    """Images and boxes of another size.

    Args:
      batch: as `Detector` takes it.
      scale: factor of rows and columns, which are then rounded.

    Returns:
      The batch with other "image", "boxes" and "image_size"; the rest as it was. Where
      an image ends before its padding, its last pixels mix with the first of that.
    """
    images = batch["image"]
    size = _scaled(images, scale)
    factors = _factors(images, size)
    changed = {"image": _resized(images, size), "boxes": batch["boxes"] * factors[None, None, :]}
    if "image_size" in batch:
        changed["image_size"] = batch["image_size"] * factors[None, 1::-1]
    return {**batch, **changed}


def multi_scale_loss(
    model: Detector,
    params: Any,
    batch: Batch,
    key: Key[Array, ""],
    model_state: Mapping[str, Any] | None = None,
    *,
    scales: Sequence[float],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Mapping[str, Any]]:
    """The loss of a batch at a scale drawn by the key, each as likely.

    `partial(multi_scale_loss, model, scales=...)` stands for `model.loss` in
    `training.make_step`. One compiled step holds all scales, so it compiles
    as long as they all do, and runs only the drawn one.

    Args:
      model: a detector for images of all scales.
      params, batch, key, model_state: as of `Detector.loss`.
      scales: factors of the images' rows and columns.

    Returns:
      As `Detector.loss`.

    Raises:
      ValueError: scales are none or not positive, or as `Detector.loss`.
    """
    _check_scales("multi_scale_loss", scales)
    draw, key = jax.random.split(key)

    def at(scale):
        def loss(params, key, model_state):
            return model.loss(params, resize_batch(batch, scale), key, model_state)

        return loss

    which = jax.random.randint(draw, (), 0, len(scales))
    return lax.switch(which, [at(scale) for scale in scales], params, key, model_state)


def detect_multi_scale(
    model: Detector,
    variables: Any,
    images: Float[Array, "B Y X C"],
    scales: Sequence[float],
    image_sizes: Int[Array, "B 2"] | Float[Array, "B 2"] | None = None,
    *,
    method: str = "hard",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    max_detections: int = 100,
) -> Detections:
    """Finds the objects in images seen at several scales.

    Costs what all scales cost: the sum of their squares in `detect` at scale 1.

    Args:
      model: a detector for images of all scales.
      variables, images, image_sizes: as of `Detector.detect`.
      scales: factors of the images' rows and columns.
      method, iou_threshold, sigma, score_threshold, max_detections: of
        `merge_detections`.

    Returns:
      Detections in pixels of the images that came.

    Raises:
      ValueError: scales are none or not positive, or as `merge_detections`.
    """
    _check_scales("detect_multi_scale", scales)
    found = []
    for scale in scales:
        size = _scaled(images, scale)
        factors = _factors(images, size)
        sizes = None if image_sizes is None else image_sizes * factors[None, 1::-1]
        each = model.detect(variables, _resized(images, size), sizes)
        found.append(each._replace(boxes=each.boxes / factors[None, None, :]))
    joined = Detections(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))
    return merge_detections(
        joined,
        method=method,
        iou_threshold=iou_threshold,
        sigma=sigma,
        score_threshold=score_threshold,
        max_detections=max_detections,
    )


def merge_detections(
    detections: Detections,
    *,
    method: str = "hard",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    max_detections: int = 100,
) -> Detections:
    """Suppresses what was found more than once.

    Args:
      detections: of a batch, in any order.
      method: "hard" removes detections that overlap a better one of their class;
        "linear" and "gaussian" lower their scores instead (Soft-NMS).
      iou_threshold: largest overlap that leaves both as they are, of the first two.
      sigma: of "gaussian": scores fall by exp(-overlap^2 / sigma).
      score_threshold: detections score higher, once lowered.
      max_detections: places for detections in an image, if as many came.

    Returns:
      The best detections, in order.

    Raises:
      ValueError: an unknown method, or an option out of range.

    Source: Bodla et al. 2017, "Soft-NMS", figure 2 (arXiv:1704.04503).
    """
    if method not in METHODS:
        raise ValueError(f"merge_detections: unknown method {method!r}; pass one of {METHODS}")

    def one(boxes, scores, classes, valid):
        if method == "hard":
            valid = class_wise_nms(boxes, scores, classes, iou_threshold, valid=valid)
        else:
            options = {"method": method, "iou_threshold": iou_threshold, "sigma": sigma}
            scores = soft_nms(boxes, scores, **options, classes=classes, valid=valid)
        ranks = jnp.where(valid & (scores > score_threshold), scores, -jnp.inf)
        top, best = lax.top_k(ranks, min(max_detections, len(scores)))
        there = top > -jnp.inf
        return Detections(
            jnp.where(there[:, None], boxes[best], 0),
            jnp.where(there, top, 0),
            jnp.where(there, classes[best], -1),
            there,
        )

    return jax.vmap(one)(*detections)


def _scaled(images: Array, scale: float) -> tuple[int, int]:
    return tuple(max(1, round(side * scale)) for side in images.shape[1:3])


def _factors(images: Array, size: tuple[int, int]) -> Float[Array, "4"]:
    """Of the coordinates of boxes: exact, though sizes are rounded."""
    y, x = (new / side for new, side in zip(size, images.shape[1:3], strict=True))
    return jnp.array([x, y, x, y], jnp.float32)


def _resized(images: Array, size: tuple[int, int]) -> Array:
    return images if images.shape[1:3] == size else resize(images, size, antialias=True)


def _check_scales(function: str, scales: Sequence[float]) -> None:
    if not scales or min(scales) <= 0:
        raise ValueError(f"{function}: scales={scales} must be one positive number or more")
