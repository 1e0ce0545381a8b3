"""Data sets and the stream of batches that training reads; they know no model."""

from jaxmodels.data import augmentation
from jaxmodels.data.cifar import cifar10, cifar100
from jaxmodels.data.digit_scenes import DigitScenes, digit_scenes
from jaxmodels.data.digits import digits
from jaxmodels.data.image_folder import image_folder
from jaxmodels.data.mnist import mnist
from jaxmodels.data.pipeline import Dataset, ImageDataset, batches
from jaxmodels.data.segmentation_folder import SegmentationDataset, segmentation_folder
from jaxmodels.data.text import ByteWindows, python_text

__all__ = [
    "ByteWindows",
    "Dataset",
    "DigitScenes",
    "ImageDataset",
    "SegmentationDataset",
    "augmentation",
    "batches",
    "cifar10",
    "cifar100",
    "digit_scenes",
    "digits",
    "image_folder",
    "mnist",
    "python_text",
    "segmentation_folder",
]
