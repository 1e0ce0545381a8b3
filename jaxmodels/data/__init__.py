"""Data sets and the stream of batches that training reads; they know no model."""

from jaxmodels.data import augmentation
from jaxmodels.data.cifar import cifar10, cifar100
from jaxmodels.data.coco import coco_detection
from jaxmodels.data.detection_dataset import DetectionDataset
from jaxmodels.data.digit_scenes import DigitScenes, digit_scenes
from jaxmodels.data.digits import digits
from jaxmodels.data.evaluation import evaluation_batches
from jaxmodels.data.image_folder import image_folder
from jaxmodels.data.mnist import mnist
from jaxmodels.data.pipeline import Dataset, ImageDataset, batches
from jaxmodels.data.resizing import FixedSize, ShortestSide
from jaxmodels.data.segmentation_folder import SegmentationDataset, segmentation_folder
from jaxmodels.data.text import ByteWindows, python_text
from jaxmodels.data.voc import VOC_CLASSES, voc_detection

__all__ = [
    "VOC_CLASSES",
    "ByteWindows",
    "Dataset",
    "DetectionDataset",
    "DigitScenes",
    "FixedSize",
    "ImageDataset",
    "SegmentationDataset",
    "ShortestSide",
    "augmentation",
    "batches",
    "cifar10",
    "cifar100",
    "coco_detection",
    "digit_scenes",
    "digits",
    "evaluation_batches",
    "image_folder",
    "mnist",
    "python_text",
    "segmentation_folder",
    "voc_detection",
]
