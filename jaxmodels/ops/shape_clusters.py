"""Widths and heights of boxes: how alike they are, and which few stand for many."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmodels.ops.checks import require_within


def shape_iou(shapes: Float[Array, "N 2"], others: Float[Array, "M 2"]) -> Float[Array, "N M"]:
    """Intersection over union of boxes that are laid on the same centre.

    iou = min(w, w') min(h, h') / (w h + w' h' - min(w, w') min(h, h'))

    Args:
      shapes, others: widths and heights, not negative.

    Returns:
      The overlap of each with each, in [0, 1]; 0 where both have no area.

    Source: Redmon and Farhadi 2017, "YOLO9000", section 2 (arXiv:1612.08242).
    """
    shared = jnp.minimum(shapes[:, None], others[None, :]).prod(axis=-1)
    union = shapes.prod(axis=-1)[:, None] + others.prod(axis=-1)[None, :] - shared
    return shared / jnp.where(union > 0, union, 1)


def cluster_shapes(
    key: Key[Array, ""],
    shapes: Float[Array, "N 2"],
    count: int,
    *,
    max_steps: int = 1000,
) -> Float[Array, "A 2"]:
    """Anchors from the boxes of a data set: k-means in which near means overlapping.

    distance(shape, centre) = 1 - iou(shape, centre)

    A centre is the mean of the shapes that are nearest to it. Starts from shapes
    drawn one after the other, each with a chance proportional to its distance from
    the centres so far, and ends when no shape changes its centre: O(N count) a step.

    Args:
      key: draws the shapes to start from.
      shapes: widths and heights, above zero, in any unit.
      count: of anchors, A.
      max_steps: ends it at the latest, since this distance may go in circles.

    Returns:
      Widths and heights, from the smallest area to the largest. The mean overlap
      of table 1 is `shape_iou(shapes, anchors).max(axis=1).mean()`.

    Raises:
      ValueError: count is below one or more than there are shapes, or a shape has
        no area.

    Source: Redmon and Farhadi 2017, "YOLO9000", section 2, "Dimension Clusters"
    (arXiv:1612.08242); the start from Arthur and Vassilvitskii 2007, "k-means++".
    """
    if not 1 <= count <= len(shapes):
        raise ValueError(
            f"cluster_shapes: count={count} is not between 1 and the number of shapes, "
            f"{len(shapes)}; pass more boxes or ask for fewer anchors"
        )
    require_within("cluster_shapes", "shapes", shapes, 0, jnp.inf, open_low=True)

    def step(state):
        centres, nearest, _, steps = state
        centres = _means(shapes, nearest, centres)
        moved = _nearest(shapes, centres)
        return centres, moved, (moved != nearest).any(), steps + 1

    centres = _first_centres(key, shapes, count)
    start = centres, _nearest(shapes, centres), True, 0
    centres, *_ = jax.lax.while_loop(lambda state: state[2] & (state[3] < max_steps), step, start)
    return centres[jnp.argsort(centres.prod(axis=1))]


def _nearest(shapes, centres):
    return shape_iou(shapes, centres).argmax(axis=1)


def _means(shapes, nearest, centres):
    """A centre that nobody is nearest to stays where it is."""
    member = (nearest[:, None] == jnp.arange(len(centres))[None, :]).astype(shapes.dtype)
    counts = member.sum(axis=0)[:, None]
    return jnp.where(counts > 0, member.T @ shapes / jnp.maximum(counts, 1), centres)


def _first_centres(key, shapes, count):
    first, *keys = jax.random.split(key, count)
    centres = jax.random.choice(first, shapes)[None]
    for key in keys:
        distance = 1 - shape_iou(shapes, centres).max(axis=1)
        # Fewer different shapes than anchors: whatever comes next is one of them again.
        distance = jnp.where(distance.max() > 0, distance, 1)
        new = shapes[jax.random.categorical(key, jnp.log(distance))]
        centres = jnp.concatenate([centres, new[None]])
    return centres
