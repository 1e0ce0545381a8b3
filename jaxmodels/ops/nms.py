"""Non-maximum suppression: of boxes that overlap, the best stays and the others go or fade.

Everywhere, a box takes part only if it is `valid`, its coordinates are finite and its
score is above minus infinity (which NaN is not): other boxes are never kept and disturb
no one. A box of negative width or height is empty and overlaps nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.box_overlaps import column_iou, iou, pairwise_iou
from jaxmodels.ops.boxes import box_area
from jaxmodels.ops.checks import require_within
from jaxmodels.ops.platform import platform
from jaxmodels.ops.stored import stored

# Boxes settled at once: more cost a larger table of overlaps, fewer more rounds.
_BLOCK = 128
_BLOCK_ON_CPU = 64
# Boxes of a block that silence others at once on a CPU: fewer cost more turns of a loop,
# more cost longer compilation, and more places that hold no box.
_AT_ONCE = 16
# Of more boxes than this, the last quarter is gathered: the rest would be in the way.
_MANY = 4096


def nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, "N"],
    iou_threshold: float,
    *,
    valid: Bool[Array, "N"] | None = None,
) -> Bool[Array, "N"]:
    """Keeps a box unless one of a higher score, itself kept, overlaps it too much.

    In falling order of scores, of equal ones in order of index:
    keep_n = not any (keep_m and IoU(m, n) > iou_threshold) over m before n

    Exactly this, though not in this order: the 128 best boxes that are left (64 on a
    CPU) settle who of them is kept, by applying the rule to all at once until nothing
    changes, and those kept silence others everywhere; then the next 128. Time O(N K)
    for K boxes kept, plus 128^2 a round; memory O(N). On an accelerator the kept of a
    round silence others at once, on a CPU 16 after 16, which XLA vectorises better.
    Of more than 4,096 boxes the last quarter is gathered first. No gradient.

    Args:
      boxes: xyxy.
      scores: of any range.
      iou_threshold: in [0, 1]; an overlap of just this much is not too much.
      valid: False for places that hold no box; None is all True.

    Returns:
      Whether each box is kept, in the order given.

    Raises:
      ValueError: the threshold is not in [0, 1].

    Source: Felzenszwalb et al. 2010, "Object Detection with Discriminatively
    Trained Part-Based Models", section 7.2; IoU as the measure from Girshick et al.
    2014, "Rich feature hierarchies", section 2.2 (arXiv:1311.2524).
    """
    require_within("nms", "iou_threshold", iou_threshold, 0, 1)
    present = _present(boxes, scores, valid)
    return _greedy(boxes, scores, None, iou_threshold, present)


def class_wise_nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, "N"],
    classes: Int[Array, "N"],
    iou_threshold: float,
    *,
    valid: Bool[Array, "N"] | None = None,
) -> Bool[Array, "N"]:
    """`nms` of every class by itself, in one go: other classes do not silence a box.

    Classes are compared, and boxes not moved apart by class, so it is as exact as
    `nms` and costs the same.

    Args:
      boxes, scores, iou_threshold, valid: as in `nms`.
      classes: any integers.

    Returns, Raises: as `nms`.

    Source: Girshick et al. 2014, section 2.2 (arXiv:1311.2524).
    """
    require_within("class_wise_nms", "iou_threshold", iou_threshold, 0, 1)
    return _greedy(boxes, scores, classes, iou_threshold, _present(boxes, scores, valid))


def soft_nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, "N"],
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    classes: Int[Array, "N"] | None = None,
    valid: Bool[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """Lowers the scores of boxes that overlap better ones, instead of dropping them.

    N times: take the box m of the highest score, as faded so far, of those not taken
    yet, and multiply the scores of all others not taken by f(IoU(m, n)):
    "linear":   f(o) = 1 - o where o >= iou_threshold, else 1
    "gaussian": f(o) = exp(-o^2 / sigma)

    One step after the other, as the order depends on what has faded: O(N^2) time;
    O(N) memory, O(N^2) with a gradient.

    Args:
      boxes: xyxy.
      scores: not negative.
      method: "linear" or "gaussian", how scores fall with the overlap.
      iou_threshold: of "linear", in [0, 1].
      sigma: of "gaussian", above zero.
      classes: boxes fade by those of their own class only; None is one class.
      valid: False for places that hold no box; None is all True.

    Returns:
      The new scores, in the order given; zero for what is not a box.

    Raises:
      ValueError: an unknown method, or an option out of range.

    Source: Bodla et al. 2017, "Soft-NMS: Improving Object Detection With One Line
    of Code", figure 2 and section 3 (arXiv:1704.04503).
    """
    fade = _fading("soft_nms", method, iou_threshold, sigma)
    classes, left = _classes(scores, classes), _present(boxes, scores, valid)

    def take(_, state):
        scores, left = state
        best = jnp.argmax(jnp.where(left, scores, -jnp.inf))
        left = left & (jnp.arange(len(scores)) != best)
        touched = left & (classes == classes[best][None])
        factors = fade(iou(boxes[best][None], boxes))
        return jnp.where(touched, scores * factors, scores), left

    scores = jnp.where(left, scores, 0)
    return lax.fori_loop(0, len(scores), take, (scores, left))[0] if len(scores) else scores


def matrix_nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, "N"],
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    classes: Int[Array, "N"] | None = None,
    valid: Bool[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """Soft suppression without steps: how far a better box was itself suppressed is guessed.

    In falling order of scores, of equal ones in order of index:
    out_n = score_n min over m before n of f(IoU(m, n)) / (min over k before m of f(IoU(k, m)))
    "linear":   f(o) = 1 - o
    "gaussian": f(o) = exp(-o^2 / sigma)

    The best box keeps its score, and a quotient of 0 / 0 is 1: what is wholly hidden
    hides nothing. All pairs at once: O(N^2) time and memory.

    Args:
      boxes, scores, classes, valid: as in `soft_nms`.
      method: "linear" or "gaussian", how scores fall with the overlap.
      sigma: of "gaussian", above zero.

    Returns:
      The new scores, in the order given; zero for what is not a box.

    Raises:
      ValueError: an unknown method, or an option out of range.

    Source: Wang et al. 2020, "SOLOv2: Dynamic and Fast Instance Segmentation", the
    section on matrix NMS (arXiv:2003.10152), with boxes in place of masks.
    """
    fade = _fading("matrix_nms", method, 0.0, sigma)
    classes, present = _classes(scores, classes), _present(boxes, scores, valid)
    rank = jnp.argsort(jnp.argsort(jnp.where(present, -scores, jnp.inf)))
    meets = (rank[:, None] < rank[None, :]) & (classes[:, None] == classes[None, :])
    overlaps = jnp.where(meets, pairwise_iou(boxes, boxes), 0)
    hidden = fade(jnp.max(overlaps, axis=0, initial=0))[:, None]
    quotients = jnp.where(hidden > 0, fade(overlaps) / jnp.where(hidden > 0, hidden, 1), 1)
    return jnp.where(present, scores * jnp.min(quotients, axis=0, initial=1), 0)


def _greedy(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, "N"],
    classes: Int[Array, "N"] | None,
    threshold: float,
    left: Bool[Array, "N"],
) -> Bool[Array, "N"]:
    """Which of the boxes that are `left` stay; None is one class."""
    if not len(scores):
        return left
    # No -0, which would rank below 0.
    boxes, scores = lax.stop_gradient((boxes, jnp.where(scores == 0, 0, scores)))
    on_cpu = platform() == "cpu"
    size = min(_BLOCK_ON_CPU if on_cpu else _BLOCK, len(scores))
    silence = _silence_in_turn if on_cpu else _silence_at_once

    def best_left(left, count):
        return lax.top_k(jnp.where(left, scores, -jnp.inf), count)[1]

    def settle_best(state):
        left, keep = state
        best = best_left(left, size)
        block = _rows((boxes, classes), best)
        kept = _settle(_overlaps(block, block) > threshold, left[best])
        left = silence(block, kept, (boxes, classes), left.at[best].set(False), threshold)
        return left, keep.at[best].max(kept)

    few = len(scores) // 4 if len(scores) > _MANY else 0
    state = left, jnp.zeros_like(left)
    left, keep = lax.while_loop(lambda state: jnp.sum(state[0]) > few, settle_best, state)
    if not few:
        return keep
    rest = best_left(left, few)
    rest_boxes, rest_classes = _rows((boxes, classes), rest)
    return keep.at[rest].max(_greedy(rest_boxes, scores[rest], rest_classes, threshold, left[rest]))


def _rows(some, places: Int[Array, "M"]):
    """Boxes and classes at these places."""
    return jax.tree.map(lambda part: part[places], some)


def _overlaps(some, others) -> Float[Array, "N M"]:
    """How much each of `some` boxes overlaps each of `others`, if they are of one class."""
    (boxes, classes), (other_boxes, other_classes) = some, others
    overlaps = pairwise_iou(boxes, other_boxes)
    if classes is None:
        return overlaps
    return jnp.where(classes[:, None] == other_classes[None, :], overlaps, 0)


def _settle(clash: Bool[Array, "N N"], left: Bool[Array, "N"]) -> Bool[Array, "N"]:
    """Who of a block is kept: whoever clashes with no kept one before it.

    The first box is right at once, the second after the first, and so on; few rounds
    are needed, as chains of boxes that each save the next but one are short.
    """
    before = (clash & jnp.triu(jnp.ones_like(clash), 1)).astype(jnp.float32)

    def again(state):
        kept, _ = state
        # A matrix product, because XLA does not vectorise a reduction of booleans.
        return left & ~(kept.astype(jnp.float32) @ before > 0), kept

    start = again((left, left))
    return lax.while_loop(lambda state: jnp.any(state[0] != state[1]), again, start)[0]


def _silence_in_turn(block, kept: Bool[Array, "M"], others, left: Bool[Array, "N"], threshold):
    """Which others are left of those that were, beside the kept of a block; for CPUs."""
    boxes, classes = others
    size = len(kept) + -len(kept) % _AT_ONCE
    # The first of a block is kept; to silence by it again changes nothing.
    block = _rows(block, jnp.nonzero(kept, size=size, fill_value=0)[0])
    # Coordinates side by side fill vectors; and each box's area is worked out once.
    columns = [stored(column) for column in (*boxes.T, box_area(boxes))]

    in_turns = jax.tree.map(lambda part: part.reshape(-1, _AT_ONCE, *part.shape[1:]), block)

    def silence(turn, most):
        some = jax.tree.map(lambda part: stored(part[turn]), in_turns)
        for n in range(_AT_ONCE):
            box, kind = jax.tree.map(lambda part, n=n: part[n], some)
            overlap = column_iou(box, *columns)
            if classes is not None:
                overlap = jnp.where(classes == kind, overlap, 0)
            most = jnp.where(overlap > most, overlap, most)
        return most

    turns = jnp.where(jnp.any(left), -(-jnp.sum(kept) // _AT_ONCE), 0)
    most = lax.fori_loop(0, turns, silence, jnp.zeros(len(boxes), boxes.dtype))
    return left & ~(most > threshold)


def _silence_at_once(block, kept: Bool[Array, "M"], others, left: Bool[Array, "N"], threshold):
    """Which others are left of those that were, beside the kept of a block; for accelerators."""
    return left & ~jnp.any((_overlaps(block, others) > threshold) & kept[:, None], axis=0)


def _present(boxes, scores, valid: Bool[Array, "N"] | None) -> Bool[Array, "N"]:
    """Which places hold a box, as the module says."""
    sound = jnp.all(jnp.isfinite(boxes), axis=1) & (scores > -jnp.inf)
    return sound if valid is None else sound & valid


def _classes(scores, classes: Int[Array, "N"] | None) -> Int[Array, "N"]:
    return jnp.zeros(scores.shape, jnp.int32) if classes is None else classes


def _fading(function: str, method: str, iou_threshold: float, sigma: float):
    """The f of `soft_nms` and `matrix_nms`."""
    require_within(function, "iou_threshold", iou_threshold, 0, 1)
    require_within(function, "sigma", sigma, 0, jnp.inf, open_low=True)
    if method == "linear":
        return lambda overlap: jnp.where(overlap >= iou_threshold, 1 - overlap, 1)
    if method == "gaussian":
        return lambda overlap: jnp.exp(-(overlap**2) / sigma)
    raise ValueError(f"{function}: unknown method {method!r}; pass 'linear' or 'gaussian'")
