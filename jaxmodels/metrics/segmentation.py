"""The confusion matrix of label maps and the four scores that follow from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape, require_within


def confusion_matrix(
    labels: Int[Array, "*N"],
    predictions: Int[Array, "*N"],
    num_classes: int,
    *,
    ignore_label: int = 255,
) -> Int[Array, "K K"]:
    """Counts of pixels by true class (row) and predicted class (column).

    out_ij = number of pixels n with labels_n = i and predictions_n = j

    Computed as one scatter of ones, exact in int32: on a CPU some twenty times
    as fast as a product of one-hot rows for 21 classes, more for more. The
    matrices of batches add up to that of the whole; sum them in int64 on the
    host beyond 2^31 pixels.

    Args:
      labels: true classes, 0 to K - 1, or `ignore_label`.
      predictions: predicted classes, 0 to K - 1; anything where ignored.
      num_classes: K.
      ignore_label: pixels with this label do not count.

    Returns:
      Counts.

    Raises:
      ValueError: shapes disagree, or a class is out of range. Compiled code
        cannot raise: there such pixels do not count.

    Source: Garcia-Garcia et al. 2017, "A Review on Deep Learning Techniques
    Applied to Semantic Segmentation", section 5.1.3, p_ij (arXiv:1704.06857).
    """
    name = "confusion_matrix"
    require_shape(name, "predictions", predictions, labels.shape, "the shape of labels")
    counted = labels != ignore_label
    if not any(isinstance(x, jax.core.Tracer) for x in (labels, predictions)):
        require_within(name, "labels", labels[counted], 0, num_classes - 1)
        require_within(name, "predictions", predictions[counted], 0, num_classes - 1)
    for classes in (labels, predictions):
        counted &= (classes >= 0) & (classes < num_classes)
    # What does not count goes beyond the last place, where bincount drops it.
    places = jnp.where(counted, labels * num_classes + predictions, num_classes**2)
    counts = jnp.bincount(places.reshape(-1), length=num_classes**2)
    return counts.reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationScores:
    """Scores of a confusion matrix.

    Attributes:
      pixel_accuracy: PA, share of pixels that are right.
      mean_pixel_accuracy: MPA, mean over classes of the share of their pixels
        that are right.
      mean_iou: MIoU, mean over classes of intersection over union.
      frequency_weighted_iou: FWIoU, the same weighted by pixels of the class.
      iou: of every class; NaN for one that neither occurs nor is predicted.
    """

    pixel_accuracy: float
    mean_pixel_accuracy: float
    mean_iou: float
    frequency_weighted_iou: float
    iou: Float[np.ndarray, "K"]


def segmentation_scores(matrix: Int[Array | np.ndarray, "K K"]) -> SegmentationScores:
    """PA, MPA, MIoU and FWIoU.

    With p_ij the pixels of class i predicted as j, t_i = sum over j of p_ij and
    u_i = t_i + sum over j of p_ji - p_ii:

    PA = sum p_ii / sum t_i            MPA = mean over i of p_ii / t_i
    MIoU = mean over i of p_ii / u_i   FWIoU = sum (t_i p_ii / u_i) / sum t_i

    The means leave out what is 0 / 0: MPA a class that does not occur, MIoU one
    that neither occurs nor is predicted. A class that is predicted and does not
    occur has an IoU of 0 and counts in MIoU. Computed in float64 on the host.

    Args:
      matrix: from `confusion_matrix`, true classes in rows; sums of such.

    Returns:
      The scores, all in [0, 1].

    Raises:
      ValueError: the matrix is not square, has negative entries or counts nothing.

    Source: Garcia-Garcia et al. 2017, section 5.1.3 (arXiv:1704.06857).
    """
    counts = np.asarray(matrix).astype(np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"segmentation_scores: matrix {counts.shape} is not square")
    if counts.min(initial=0) < 0 or not counts.sum() > 0:
        raise ValueError(
            f"segmentation_scores: matrix has {counts.sum():g} pixels and a smallest count of "
            f"{counts.min(initial=0):g}; give counts of at least one pixel that is not ignored"
        )
    right, true = np.diag(counts), counts.sum(axis=1)
    union = true + counts.sum(axis=0) - right
    with np.errstate(invalid="ignore"):
        accuracy, iou = right / true, right / union
    return SegmentationScores(
        pixel_accuracy=float(right.sum() / true.sum()),
        mean_pixel_accuracy=float(np.nanmean(accuracy)),
        mean_iou=float(np.nanmean(iou)),
        frequency_weighted_iou=float(np.nansum(true * iou) / true.sum()),
        iou=iou,
    )
