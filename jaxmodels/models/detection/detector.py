"""The two calls that all detectors share: the loss of a batch, and the boxes in images."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.detections import Detections

Batch = Mapping[str, Array]


class Detector(nn.Module):
    """Base of detectors, which define a call, `losses` and `detections`.

    A batch is what the data sets give: "image" (B, Y, X, C) in [-1, 1], "boxes"
    (B, N, 4) as xyxy in pixels, and "box_labels" (B, N), from 0, or -1 where an image has
    fewer than N boxes. Optional are "image_size" (B, 2), rows and columns before
    the image was padded below and on the right, and "box_ignored" (B, N), True for
    boxes that are neither objects nor background (crowds, difficult ones).
    """

    def losses(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The terms of the training loss by name, each a mean over the batch.

        Runs inside `apply` in training mode, with the random stream "sample".
        """
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def detections(
        self, images: Float[Array, "B Y X C"], image_sizes: Float[Array, "B 2"]
    ) -> Detections:
        """Finds boxes; runs inside `apply`, in inference mode."""
        raise NotImplementedError(f"{type(self).__name__} has no detections")

    @nn.nowrap
    def loss(
        self,
        params: Any,
        batch: Batch,
        key: Key[Array, ""],
        model_state: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Mapping[str, Any]]:
        """The training loss, in the form that `training.make_step` takes.

        Args:
          params: the parameters.
          batch: see the class.
          key: for what training draws: samples of anchors, dropped units.
          model_state: other variables by collection, such as "batch_stats".

        Returns:
          The sum of all terms, the terms by name, and the new model_state.

        Raises:
          ValueError: the batch lacks something, or shapes disagree.
        """
        require_batch(type(self).__name__, batch)
        sample, dropout = jax.random.split(key)
        terms, changed = self.apply(
            {"params": params, **(model_state or {})},
            batch,
            method="losses",
            rngs={"sample": sample, "dropout": dropout},
            mutable=list(model_state or {}),
        )
        return sum(terms.values()), terms, {**(model_state or {}), **changed}

    @nn.nowrap
    def detect(
        self,
        variables: Any,
        images: Float[Array, "B Y X C"],
        image_sizes: Int[Array, "B 2"] | Float[Array, "B 2"] | None = None,
    ) -> Detections:
        """Finds the objects in images; compiles once for each shape of images.

        Args:
          variables: parameters and other collections, as `init` makes them.
          images: in [-1, 1].
          image_sizes: rows and columns of each image without its padding; boxes are
            cut to them. None means that nothing was padded.

        Returns:
          Boxes, scores, classes and which places are filled.

        Raises:
          ValueError: images are not what the model takes.
        """
        if image_sizes is None:
            image_sizes = jnp.broadcast_to(jnp.array(images.shape[1:3]), (len(images), 2))
        return self.apply(variables, images, image_sizes.astype(jnp.float32), method="detections")


def require_batch(model: str, batch: Batch) -> None:
    """Raises unless a batch has images, boxes and labels of agreeing shapes.

    Args:
      model: name of the model, for the message.
      batch: what came.

    Raises:
      ValueError: naming what is missing or misshapen.
    """
    if missing := {"image", "boxes", "box_labels"} - {*batch}:
        raise ValueError(
            f"{model}: the batch has no {', '.join(map(repr, sorted(missing)))}, only "
            f"{sorted(batch)}; use a data set with boxes"
        )
    count, boxes = len(batch["image"]), batch["boxes"].shape[1]
    if boxes < 1:
        raise ValueError(
            f"{model}: batch['boxes'] {batch['boxes'].shape} has no place for a box; give one, "
            "with the label -1 where an image holds nothing"
        )
    wanted = {
        "boxes": ((count, boxes, 4), "(B, N, 4)"),
        "box_labels": ((count, boxes), "(B, N)"),
        "image_size": ((count, 2), "(B, 2)"),
        "box_ignored": ((count, boxes), "(B, N)"),
    }
    for name, (shape, meaning) in wanted.items():
        if name in batch:
            require_shape(model, f"batch[{name!r}]", batch[name], shape, meaning)


def image_sizes(batch: Batch) -> Float[Array, "B 2"]:
    """Rows and columns of each image of a batch without its padding."""
    images = batch["image"]
    whole = jnp.broadcast_to(jnp.array(images.shape[1:3]), (len(images), 2))
    return batch.get("image_size", whole).astype(jnp.float32)


def objects(batch: Batch) -> tuple[Array, Array]:
    """Which boxes of a batch are objects (B, N), and which are to be ignored (B, N)."""
    there = batch["box_labels"] >= 0
    ignored = batch.get("box_ignored", jnp.zeros_like(there)) & there
    return there & ~ignored, ignored
