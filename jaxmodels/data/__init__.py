"""Data sets and the stream of batches that training reads; they know no model."""

from jaxmodels.data import augmentation
from jaxmodels.data.cifar import cifar10, cifar100
from jaxmodels.data.coco import coco_detection
from jaxmodels.data.detection_dataset import DetectionDataset
from jaxmodels.data.digit_scenes import DigitScenes, digit_scenes
from jaxmodels.data.digits import digits
from jaxmodels.data.documents import TokenDocuments, read_documents, tokenize
from jaxmodels.data.evaluation import evaluation_batches
from jaxmodels.data.image_dataset import ImageDataset
from jaxmodels.data.image_folder import image_folder
from jaxmodels.data.mnist import mnist
from jaxmodels.data.packed_stream import PackedStream
from jaxmodels.data.packing import (
    DocumentRows,
    first_fit_decreasing,
    pack_documents,
    pad_documents,
)
from jaxmodels.data.pipeline import Dataset, batches
from jaxmodels.data.resizing import FixedSize, ShortestSide
from jaxmodels.data.segmentation_folder import SegmentationDataset, segmentation_folder
from jaxmodels.data.text import ByteWindows, python_text
from jaxmodels.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer
from jaxmodels.data.voc import VOC_CLASSES, voc_detection

__all__ = [
    "VOC_CLASSES",
    "ByteTokenizer",
    "ByteWindows",
    "Dataset",
    "DetectionDataset",
    "DigitScenes",
    "DocumentRows",
    "FileTokenizer",
    "FixedSize",
    "ImageDataset",
    "PackedStream",
    "SegmentationDataset",
    "ShortestSide",
    "TokenDocuments",
    "Tokenizer",
    "augmentation",
    "batches",
    "cifar10",
    "cifar100",
    "coco_detection",
    "digit_scenes",
    "digits",
    "evaluation_batches",
    "first_fit_decreasing",
    "image_folder",
    "load_tokenizer",
    "mnist",
    "pack_documents",
    "pad_documents",
    "python_text",
    "read_documents",
    "segmentation_folder",
    "tokenize",
    "voc_detection",
]
