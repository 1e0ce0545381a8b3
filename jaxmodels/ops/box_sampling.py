"""Which of many anchors, of which most are background, a training step learns from.

Matches are those of `ops.matching`: >= 0 the index of an object, -1 background, and
others neither.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodels.ops.checks import require_shape
from jaxmodels.ops.matching import BACKGROUND


def sample_balanced(
    key: Key[Array, ""], matches: Int[Array, "A"], count: int, positive_share: float
) -> tuple[Bool[Array, "A"], Bool[Array, "A"]]:
    """Draws positives up to a share of the sample and fills it up with background.

    positives = min(all positives, floor(count positive_share)),
    negatives = min(all negatives, count - positives)

    Each is drawn uniformly and without replacement.

    Args:
      key: for the draw.
      matches: of the anchors of one image.
      count: size of the sample; smaller if there are too few.
      positive_share: the largest, in [0, 1].

    Returns:
      Which anchors are positive, and which negative, samples.

    Raises:
      ValueError: count is not positive, or the share is outside [0, 1].

    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.3 (arXiv:1506.01497).
    """
    indices, positive, valid = sample_rois(key, matches, count, positive_share)
    nowhere = jnp.zeros(matches.shape, bool)
    return nowhere.at[indices].max(positive), nowhere.at[indices].max(valid & ~positive)


def sample_rois(
    key: Key[Array, ""], matches: Int[Array, "A"], count: int, positive_share: float
) -> tuple[Int[Array, "S"], Bool[Array, "S"], Bool[Array, "S"]]:
    """The draw of `sample_balanced` as a list of S = count places, to gather by.

    Args:
      key, matches, count, positive_share: as of `sample_balanced`.

    Returns:
      Indices of the samples, positives first; which are positive; and which places
      are filled, all others holding some index within the bounds.

    Raises:
      ValueError: count is not positive, or the share is outside [0, 1].

    Source: Girshick 2015, "Fast R-CNN", section 2.3, "Mini-batch sampling"
    (arXiv:1504.08083).
    """
    _check_sample(count, positive_share)
    chance = jax.random.uniform(key, matches.shape)
    positives, some = _draw(chance, matches >= 0, int(count * positive_share))
    negatives, others = _draw(chance, matches == BACKGROUND, count)
    places = jnp.arange(count)
    positive = places < some
    listed = jnp.concatenate([positives, negatives])
    # Behind the positives there are, not behind those there might be.
    behind = len(positives) + places - some
    indices = listed[jnp.clip(jnp.where(positive, places, behind), 0, len(listed) - 1)]
    return indices, positive, places < some + others


def hardest(losses: Float[Array, "A"], count: int, valid: Bool[Array, "..."]) -> Bool[Array, "A"]:
    """Marks the samples of the largest loss: online hard example mining.

    Args:
      losses: of all samples of an image.
      count: how many to mark; fewer if fewer are valid.
      valid: (A,), which samples there are.

    Returns:
      Which samples to learn from. Of equal losses the first are taken.

    Raises:
      ValueError: count is not positive, or shapes disagree.

    Source: Shrivastava et al. 2016, "Training Region-based Object Detectors with
    Online Hard Example Mining", section 4 (arXiv:1604.03540), without its
    suppression of samples that overlap, as in R-FCN (arXiv:1605.06409, section 3).
    """
    if count < 1:
        raise ValueError(f"hardest: count={count} must be at least 1")
    require_shape("hardest", "valid", valid, losses.shape, "(A,)")
    order, _ = _draw(losses, valid, count)
    return jnp.zeros(valid.shape, bool).at[order].set(True) & valid


def _draw(value: Float[Array, "A"], among: Bool[Array, "A"], count: int) -> tuple[Array, Array]:
    """The places of the largest values `among` some, those first, and how many there are."""
    count = min(count, len(value))
    _, places = lax.top_k(jnp.where(among, value, -jnp.inf), count)
    return places, jnp.minimum(among.sum(), count)


def _check_sample(count: int, positive_share: float) -> None:
    if count < 1 or not 0 <= positive_share <= 1:
        raise ValueError(
            f"sample_rois: count={count} must be at least 1 and positive_share={positive_share} "
            f"in [0, 1]"
        )
