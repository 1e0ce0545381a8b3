"""What detectors by points share: places of objects on a map, what covers them, the best boxes."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.layers.convolution import Conv
from jaxmodels.ops.anchors import grid_points
from jaxmodels.ops.detection_losses import heat_map_focal_loss
from jaxmodels.ops.detections import Detections
from jaxmodels.ops.heat_maps import heat_map_peaks

# The chance of an object, a tenth, that heat maps start with (Law and Deng 2018, section 4.1).
HEAT_BIAS = -2.19


class Predictor(nn.Module):
    """The last convolution of a head; starts small, so that the bias alone decides.

    Attributes:
      features: channels of the output.
      kernel_size: of the convolution.
      bias: at first.
      dtype: of the convolution; parameters and the output are float32.
    """

    features: int
    kernel_size: int = 1
    bias: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X F"]:
        """Returns maps of `features` channels."""
        conv = Conv(
            self.features,
            self.kernel_size,
            use_bias=False,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            name="conv",
        )
        bias = self.param("bias", nn.initializers.constant(self.bias), (self.features,))
        return conv(x).astype(jnp.float32) + bias[None, None, None, :]


class PointHead(nn.Module):
    """A value at every place of a map: a 3 x 3 convolution, ReLU, and one of 1 x 1.

    Attributes:
      features: channels of the output.
      width: channels between the convolutions.
      bias: of the last, at first.
      dtype: of the computation; parameters and the output are float32.

    Source: Zhou et al. 2019, "Objects as Points", section 4 (arXiv:1904.07850).
    """

    features: int
    width: int
    bias: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X F"]:
        """Returns maps of `features` channels."""
        x = nn.relu(Conv(self.width, 3, dtype=self.dtype, name="hidden")(x))
        return Predictor(self.features, bias=self.bias, dtype=self.dtype, name="value")(x)


def finest_maps(strides: dict[str, int]) -> tuple[list[str], int]:
    """Names of the maps of the smallest stride, and that stride: all maps of an hourglass."""
    stride = min(strides.values())
    return [name for name, each in strides.items() if each == stride], stride


def cells_of(
    points: Float[Array, "N 2"], grid: tuple[int, int], stride: int
) -> tuple[Int[Array, "N 2"], Float[Array, "N 2"]]:
    """The cells of a map that points fall into, and where in them.

    cell = floor(point / stride),   offset = point / stride - cell

    Args:
      points: x and y in pixels.
      grid: rows and columns of the map; points on its lower and right border, where a
        box may end, belong to the last cell.
      stride: pixels a cell.

    Returns:
      Column and row of each cell, and offsets in [0, 1] (1 on those borders).
    """
    places = points / stride
    last = jnp.array([[grid[1] - 1, grid[0] - 1]])
    cells = jnp.clip(jnp.floor(places).astype(jnp.int32), 0, last)
    return cells, places - cells


def at_cells(values: Float[Array, "Y X F"], cells: Int[Array, "N 2"]) -> Float[Array, "N F"]:
    """What a map holds at (column, row) cells."""
    return values[cells[:, 1], cells[:, 0]]


def covered(
    points: Float[Array, "*P 2"],
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    chosen: Bool[Array, "N"],
    num_classes: int,
) -> Bool[Array, "*P K"]:
    """Whether a point lies in a chosen box of a class, border included.

    Such boxes are ignored ones: at their points their class is neither true nor false.

    Args:
      points: x and y in pixels.
      boxes, labels: of an image.
      chosen: which of them count.
      num_classes: K.
    """
    points, boxes = points[..., None, :], boxes[(None,) * (points.ndim - 1)]
    inside = ((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(axis=-1)
    classes = (labels[:, None] == jnp.arange(num_classes)[None, :]) & chosen[:, None]
    return jnp.einsum("...n,nk->...k", inside.astype(jnp.float32), classes.astype(jnp.float32)) > 0


def taught_cells(
    grid: tuple[int, int],
    stride: int,
    boxes: Float[Array, "N 4"],
    labels: Int[Array, "N"],
    ignored: Bool[Array, "N"],
    num_classes: int,
) -> Bool[Array, "Y X K"]:
    """Which cells of a heat map no ignored box of the class touches; one may end in them."""
    reach = stride / 2 * jnp.array([[-1.0, -1.0, 1.0, 1.0]])
    return ~covered(grid_points(grid, stride), boxes + reach, labels, ignored, num_classes)


def heat_loss(
    logits: Float[Array, "B Y X K"], heat: Float[Array, "B Y X K"], taught: Bool[Array, "B Y X K"]
) -> Float[Array, ""]:
    """The focal loss of a heat map, a mean over the objects of the batch.

    Args:
      logits: of what the network says.
      heat: of the objects, 1 at each.
      taught: where the heat is known; it is at objects.

    Source: Law and Deng 2018, "CornerNet", equation 1 (arXiv:1808.01244).
    """
    losses = jnp.where(taught | (heat == 1), heat_map_focal_loss(logits, heat), 0)
    return losses.sum() / jnp.maximum((heat == 1).sum(), 1)


def mean_over(there: Bool[Array, "*B"], losses: Float[Array, "*B"]) -> Float[Array, ""]:
    """The mean of the losses of what there is, or zero."""
    return jnp.where(there, losses, 0).sum() / jnp.maximum(there.sum(), 1)


def best_cells(
    logits: Float[Array, "Y X K"], size: Float[Array, "2"], stride: int, count: int
) -> tuple[Float[Array, "P"], Int[Array, "P"], Int[Array, "P 2"]]:
    """The highest peaks of an image's heat map.

    Args:
      logits: of the heat map.
      size: rows and columns of the image without its padding, in pixels; cells that
        begin beyond it are left out (a box may end just where one begins).
      stride: pixels a cell.
      count: P, or fewer if the map has fewer cells.

    Returns:
      Scores in [0, 1], falling, 0 where there are fewer peaks; and of each the class, and
      column and row.
    """
    begin = grid_points(logits.shape[:2], stride) - stride / 2
    inside = (begin <= size[None, None, ::-1]).all(axis=-1)
    heat = jnp.where(inside[..., None], nn.sigmoid(logits), 0)
    scores, classes, rows, columns = heat_map_peaks(heat, min(count, heat.size))
    return scores, classes, jnp.stack([columns, rows], axis=-1)


def ranked(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, "N"],
    classes: Int[Array, "N"],
    valid: Bool[Array, "N"],
    count: int,
) -> Detections:
    """The best of an image's valid boxes, by falling score, without suppression.

    Args:
      boxes, scores, classes: of the candidates.
      valid: which of them may be chosen.
      count: places of the result; fewer if there are fewer candidates.
    """
    top, best = lax.top_k(jnp.where(valid, scores, -jnp.inf), min(count, len(scores)))
    valid = valid[best]
    return Detections(
        jnp.where(valid[:, None], boxes[best], 0),
        jnp.where(valid, top, 0),
        jnp.where(valid, classes[best], -1),
        valid,
    )
