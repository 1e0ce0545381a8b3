"""Whether samples are copies: the distance to the nearest training example."""

import numpy as np
from jaxtyping import Float


def nearest_neighbour_distances(
    queries: Float[np.ndarray, "N D"],
    references: Float[np.ndarray, "M D"],
    exclude_self: bool = False,
) -> Float[np.ndarray, "N"]:
    """The Euclidean distance of every query to the closest reference.

    out_n = min over m of |queries_n - references_m|

    scikit-learn finds the neighbour; the distance to it is then taken from the
    difference, so that an exact copy is at exactly 0. Time is O(N M D).

    Args:
      queries: one point per row.
      references: the points to search.
      exclude_self: the queries are the references, and no row counts as its
        own neighbour; an identical other row does.

    Returns:
      One float64 distance per query.

    Raises:
      ValueError: the widths differ, no references are left to search, or
        `exclude_self` with queries that are not the references.
    """
    if queries.shape[1] != references.shape[1]:
        raise ValueError(
            f"nearest_neighbour_distances: queries {queries.shape} and references "
            f"{references.shape} differ in width; describe both by the same features"
        )
    if exclude_self and not np.array_equal(queries, references):
        raise ValueError(
            f"nearest_neighbour_distances: exclude_self needs queries {queries.shape} to be the "
            f"references {references.shape}; pass the same array twice or exclude_self=False"
        )
    if len(references) < 1 + exclude_self:
        raise ValueError(
            f"nearest_neighbour_distances: references {references.shape} leave no neighbour to "
            f"find with exclude_self={exclude_self}; pass more rows"
        )
    from sklearn.neighbors import NearestNeighbors

    queries, references = queries.astype(np.float64), references.astype(np.float64)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(references)
    # Asked without points, scikit-learn leaves out each row itself.
    nearest = search.kneighbors(None if exclude_self else queries, return_distance=False)[:, 0]
    return np.linalg.norm(queries - references[nearest], axis=1)
