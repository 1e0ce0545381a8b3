"""Smooth surrogates of maxima, ranks and counts, to be trained on directly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.ops.checks import require_shape, require_within


def soft_maximum(x: Float[Array, "*B N"], temperature: float | int) -> Float[Array, "*B"]:
    """The largest entry, smoothed.

    out = t log sum_i exp(x_i / t),   max x <= out <= max x + t log N

    Args:
      x: any values, along the last axis.
      temperature: t > 0; towards 0 the result is the maximum itself.

    Returns:
      One value a row; its gradient in x is `soft_one_hot`.

    Raises:
      ValueError: the temperature is not positive.

    Source: the log-sum-exp bound; Boyd and Vandenberghe 2004, "Convex
    Optimization", section 3.1.5.
    """
    _require_temperature("soft_maximum", temperature)
    return temperature * jax.nn.logsumexp(x / temperature, axis=-1)


def soft_one_hot(x: Float[Array, "*B N"], temperature: float | int) -> Float[Array, "*B N"]:
    """Where the largest entry is, as weights that sum to 1.

    out_i = exp(x_i / t) / sum_j exp(x_j / t)

    Args:
      x: any values, along the last axis.
      temperature: t > 0; towards 0 the largest entry gets 1, equally large ones share it.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: the temperature is not positive.

    Source: Bridle 1990, "Training Stochastic Model Recognition Algorithms as
    Networks can lead to Maximum Mutual Information Estimation of Parameters".
    """
    _require_temperature("soft_one_hot", temperature)
    return jax.nn.softmax(x / temperature, axis=-1)


def soft_argmax(x: Float[Array, "*B N"], temperature: float | int) -> Float[Array, "*B"]:
    """The index of the largest entry, as an expectation.

    out = sum_i i soft_one_hot(x)_i

    Between two equally large entries it is their middle, which need not be large.

    Args:
      x: any values, along the last axis.
      temperature: t > 0; towards 0 the result is the argmax.

    Returns:
      A number in [0, N - 1] a row.

    Raises:
      ValueError: the temperature is not positive.

    Source: Chapelle and Wu 2010, "Gradient descent optimization of smoothed
    information retrieval metrics".
    """
    _require_temperature("soft_argmax", temperature)
    return soft_one_hot(x, temperature) @ jnp.arange(x.shape[-1], dtype=x.dtype)


def soft_rank(x: Float[Array, "*B N"], temperature: float | int) -> Float[Array, "*B N"]:
    """The place of each entry in ascending order, 1 to N.

    out_i = 1 + sum over j != i of sigmoid((x_i - x_j) / t)

    Ranks always sum to N (N + 1) / 2. O(N^2) in time and memory.

    Args:
      x: any values, along the last axis.
      temperature: t > 0; towards 0 the ranks are whole numbers, those of equal
        entries the mean of the places that they take.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: the temperature is not positive.

    Source: Qin, Liu and Li 2010, "A General Approximation Framework for Direct
    Optimization of Information Retrieval Measures", the position function.
    """
    _require_temperature("soft_rank", temperature)
    ahead = jax.nn.sigmoid((x[..., :, None] - x[..., None, :]) / temperature)
    # An entry is half ahead of itself.
    return 0.5 + ahead.sum(axis=-1)


def soft_accuracy(
    logits: Float[Array, "*B K"], labels: Int[Array, "*B"], temperature: float | int = 1.0
) -> Float[Array, ""]:
    """The mean weight that examples give to their own class.

    out = mean_b soft_one_hot(logits_b)_(label_b)

    Args:
      logits: of the classes.
      labels: from 0 to K - 1.
      temperature: t > 0; towards 0 the result is the accuracy. At 1 it is the expected
        accuracy of classes drawn by their probabilities.

    Returns:
      A share in [0, 1].

    Raises:
      ValueError: shapes disagree, the temperature is not positive, or labels are out
        of range (only seen outside of compiled functions).

    Source: the expectation of the definition.
    """
    name = "soft_accuracy"
    require_shape(name, "labels", labels, logits.shape[:-1], "*B of logits (*B, K)")
    require_within(name, "labels", labels, 0, logits.shape[-1] - 1)
    _require_temperature(name, temperature)
    weights = soft_one_hot(logits, temperature)
    return jnp.take_along_axis(weights, labels[..., None], axis=-1).mean()


def soft_f1(
    probabilities: Float[Array, "N *K"], targets: Float[Array, "N *K"]
) -> Float[Array, "*K"]:
    """The F1 score (Dice's coefficient) of expected counts.

    out = 2 TP / (2 TP + FP + FN) = 2 sum_n p_n y_n / sum_n (p_n + y_n)

    It looks at all examples at once: a batch should hold some of the rare class, and
    the mean over batches is not the score of all.

    Args:
      probabilities: that an example is of the class, in [0, 1]; `sigmoid(logits / t)`
        for small t makes them, and the score, exact. Further axes are classes.
      targets: 1 or 0, or anything between.

    Returns:
      A score in [0, 1] for each class; 0 without anything to find or found, as in
      scikit-learn. Its complement is the loss.

    Raises:
      ValueError: shapes disagree.

    Source: Pastor-Pellicer et al. 2013, "F-Measure as the Error Function to Train
    Neural Networks"; Bénédict et al. 2021, "sigmoidF1" (arXiv:2108.10566).
    """
    both, either = _overlap("soft_f1", probabilities, targets)
    return _ratio(2 * both, either)


def soft_iou(
    probabilities: Float[Array, "N *K"], targets: Float[Array, "N *K"]
) -> Float[Array, "*K"]:
    """The intersection over union (Jaccard's index) of expected counts.

    out = TP / (TP + FP + FN) = sum_n p_n y_n / sum_n (p_n + y_n - p_n y_n)

    Args:
      probabilities: that a pixel or example is of the class, as of `soft_f1`.
      targets: 1 or 0, or anything between.

    Returns:
      As `soft_f1`, F, of which it is F / (2 - F).

    Raises:
      ValueError: shapes disagree.

    Source: Rahman and Wang 2016, "Optimizing Intersection-Over-Union in Deep Neural
    Networks for Image Segmentation".
    """
    both, either = _overlap("soft_iou", probabilities, targets)
    return _ratio(both, either - both)


def _require_temperature(function: str, temperature: float | int) -> None:
    require_within(function, "temperature", temperature, 0, float("inf"), open_low=True)


def _overlap(function: str, probabilities, targets):
    require_shape(function, "targets", targets, probabilities.shape, "those of probabilities")
    return (probabilities * targets).sum(axis=0), (probabilities + targets).sum(axis=0)


def _ratio(part, whole):
    # Only the denominator is replaced: the gradient of a quotient by zero would be NaN.
    return part / jnp.where(whole == 0, 1, whole)
