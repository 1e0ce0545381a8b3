"""Data sets and the stream of batches that training reads; they know no model."""

from jaxmodels.data.digits import digits
from jaxmodels.data.image_folder import image_folder
from jaxmodels.data.pipeline import ImageDataset, batches

__all__ = ["ImageDataset", "batches", "digits", "image_folder"]
