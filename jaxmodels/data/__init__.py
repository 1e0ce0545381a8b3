"""Data sets and the stream of batches that training reads; they know no model."""

from jaxmodels.data.digits import digits
from jaxmodels.data.image_folder import image_folder
from jaxmodels.data.pipeline import Dataset, ImageDataset, batches
from jaxmodels.data.text import ByteWindows, python_text

__all__ = [
    "ByteWindows",
    "Dataset",
    "ImageDataset",
    "batches",
    "digits",
    "image_folder",
    "python_text",
]
