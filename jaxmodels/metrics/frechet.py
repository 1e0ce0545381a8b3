"""How far two clouds of features lie apart, as far as mean and covariance tell."""

import numpy as np
from jaxtyping import Float


def frechet_distance(
    features_a: Float[np.ndarray, "N D"], features_b: Float[np.ndarray, "M D"]
) -> float:
    """The squared Fréchet distance between Gaussians fitted to two sets of features.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    Neither covariance nor matrix root is formed: with S = R^T R from the QR
    decomposition of the centred features, tr (S_a S_b)^(1/2) is the sum of the
    singular values of R_a R_b^T. This loses no digits to squaring and does not
    mind singular covariances. Time is O((N + M) D^2), all in float64.

    Args:
      features_a, features_b: one row per sample, at least two rows each. The
        estimate falls with the number of rows, so compare equal numbers.

    Returns:
      The distance in squared units of the features; 0 for equal moments.

    Raises:
      ValueError: the widths differ, fewer than two rows, or values not finite.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule",
    equation 6 (arXiv:1706.08500); covariances are unbiased (N - 1), as in its code.
    """
    _check("features_a", features_a)
    _check("features_b", features_b)
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"frechet_distance: features_a {features_a.shape} and features_b {features_b.shape} "
            "differ in width; use the same features for both"
        )
    mean_a, root_a = _moments(features_a)
    mean_b, root_b = _moments(features_b)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    apart = np.sum((mean_a - mean_b) ** 2)
    spread = np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap
    # Rounding may carry the spread of equal clouds below zero.
    return float(apart + max(spread, 0.0))


def _moments(
    features: Float[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "R D"]]:
    """The mean, and R with R^T R the covariance."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    return mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)


def _check(name: str, features: Float[np.ndarray, "N D"]) -> None:
    if len(features) < 2:
        raise ValueError(
            f"frechet_distance: {name} has shape {features.shape}; a covariance needs two rows"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"frechet_distance: {name} holds NaN or infinity; remove those rows")
