"""Measures of results; they know no model."""

from jaxmodels.metrics.frechet import frechet_distance
from jaxmodels.metrics.neighbours import nearest_neighbour_distances
from jaxmodels.metrics.samples import SampleJudge

__all__ = ["SampleJudge", "frechet_distance", "nearest_neighbour_distances"]
