"""Random changes of whole batches on the device: pure functions of a batch and a key.

    batch = augmentation.resized_crop(batch, key)

A batch is a dictionary: "image" (B, Y, X, C) in [-1, 1], and as there are
"label", "mask", "boxes" with "box_labels", and "instances", which follow the
image. Each image has draws of its own; every function can be compiled.
"""

from jaxmodels.data.augmentation.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour,
    luma,
)
from jaxmodels.data.augmentation.erasing import (
    IMAGENET_MEAN,
    cutout,
    grid_mask,
    hide_and_seek,
    random_erasing,
)
from jaxmodels.data.augmentation.geometry import (
    affine,
    flip_horizontal,
    flip_vertical,
    resized_crop,
)
from jaxmodels.data.augmentation.mixing import cutmix, mixup
from jaxmodels.data.augmentation.sequence import AUGMENTATIONS, augment

__all__ = [
    "AUGMENTATIONS",
    "IMAGENET_MEAN",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "affine",
    "augment",
    "colour",
    "cutmix",
    "cutout",
    "flip_horizontal",
    "flip_vertical",
    "grid_mask",
    "hide_and_seek",
    "luma",
    "mixup",
    "random_erasing",
    "resized_crop",
]
