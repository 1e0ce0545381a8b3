"""What every detector returns: a fixed number of boxes, and which of them count."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Detections(NamedTuple):
    """Boxes found in each image, best first; a pytree of static shape.

    Attributes:
      boxes: xyxy in pixels.
      scores: in [0, 1], falling; 0 where not valid.
      classes: 0 to num_classes - 1, without a background; -1 where not valid.
      valid: whether the place holds a detection.
    """

    boxes: Float[Array, "*B N 4"]
    scores: Float[Array, "*B N"]
    classes: Int[Array, "*B N"]
    valid: Bool[Array, "*B N"]
