"""Images as a checkpoint wants to see them: preprocessor_config.json of transformers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxmodels.weights.folder import PREPROCESSING, find_folder, read_config

# From here on, a crop_pct means nothing and images are squeezed into the square.
_WARP_FROM = 384
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
_BILINEAR = _FILTERS["bilinear"]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From images of any size to one batch: resize, crop the centre, scale, normalise.

    out = (scale pixel - mean) / std

    The resizing is Pillow's own, so the values are those of transformers' image
    processors (`ViTImageProcessor`, `BitImageProcessor`, `ConvNextImageProcessor`).

    Attributes:
      size: (height, width) to resize to; one number is the length of the shorter
        side, which keeps the aspect; None resizes nothing.
      resample: "nearest", "bilinear", "bicubic" or "lanczos".
      crop: (height, width) to cut from the centre, of images that are too small
        with zeros around; None cuts nothing.
      scale: factor on pixels of 0 to 255.
      mean, std: of each channel, or one number for all.
    """

    size: tuple[int, int] | int | None = (224, 224)
    resample: str = "bilinear"
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] | float = 0.5
    std: tuple[float, ...] | float = 0.5

    def __call__(self, images: Sequence[Image.Image | np.ndarray]) -> Float[np.ndarray, "B Y X C"]:
        """Prepares images.

        Args:
          images: PIL images (made RGB) or uint8 arrays (Y, X, C) or (Y, X), which
            becomes one channel.

        Returns:
          A float32 batch.

        Raises:
          ValueError: something that is no image, or images that end up in
            different sizes.
        """
        done = [self._one(_as_pil(image)) for image in images]
        shapes = {image.shape for image in done}
        if len(shapes) != 1:
            raise ValueError(
                f"Preprocessing: images end up with shapes {sorted(shapes)}; a batch needs one, "
                f"give a crop or a size of both sides"
            )
        batch = np.stack(done).astype(np.float32) * np.float32(self.scale)
        return (batch - np.float32(self.mean)) / np.float32(self.std)

    def _one(self, image: Image.Image) -> np.ndarray:
        if self.size is not None:
            image = image.resize(self._width_and_height(image), _FILTERS[self.resample])
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return pixels if self.crop is None else _centre(pixels, self.crop)

    def _width_and_height(self, image: Image.Image) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size[::-1]
        shorter = min(image.size)
        return tuple(int(self.size * side / shorter) for side in image.size)


def _as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    good = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if good and image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if not good or (image.ndim != 2 and image.shape[-1:] != (3,)):
        what = f"{image.dtype} {image.shape}" if hasattr(image, "shape") else type(image).__name__
        raise ValueError(
            f"Preprocessing: {what} is neither a PIL image nor a uint8 array (Y, X) or (Y, X, 3), "
            f"channels last"
        )
    return Image.fromarray(image)


def _centre(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of an image, with zeros around it if it is smaller than that."""
    for axis, wanted in enumerate(size):
        missing = max(wanted - pixels.shape[axis], 0)
        widths = [(0, 0)] * pixels.ndim
        widths[axis] = (missing - missing // 2, missing // 2)
        pixels = np.pad(pixels, widths)
        start = (pixels.shape[axis] - wanted) // 2
        pixels = pixels.take(range(start, start + wanted), axis=axis)
    return pixels


def load_preprocessing(source: str | Path, *, revision: str | None = None) -> Preprocessing:
    """Reads the preprocessing that belongs to a checkpoint.

    Args:
      source: a folder with preprocessor_config.json, or `owner/name` on the hub.
      revision: branch, tag or commit on the hub.

    Raises:
      ValueError: no such file, or a step in it that is not known here.
    """
    folder = find_folder(source, revision)
    if not (folder / PREPROCESSING).is_file():
        raise ValueError(
            f"load_preprocessing: no {PREPROCESSING} in {folder}; make a Preprocessing yourself"
        )
    config = read_config(folder, PREPROCESSING)
    unknown = [name for name in ("do_pad", "do_reduce_labels") if config.get(name)]
    if config.get("crop_pct") is not None and config.get("do_center_crop"):
        unknown.append("do_center_crop beside crop_pct")
    resample = config.get("resample", _BILINEAR)
    if unknown or resample not in _FILTERS.values():
        raise ValueError(
            f"load_preprocessing: {folder / PREPROCESSING} has resample={resample} and switches on "
            f"{unknown}; known are resamplings {_FILTERS}, resizing, a centre crop and normalising"
        )
    size, crop = _size_and_crop(config)
    normalise = config.get("do_normalize", True)
    return Preprocessing(
        size=size if config.get("do_resize", True) else None,
        resample=next(name for name, code in _FILTERS.items() if code == resample),
        crop=crop,
        scale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        mean=_numbers(config.get("image_mean", 0.5)) if normalise else 0.0,
        std=_numbers(config.get("image_std", 0.5)) if normalise else 1.0,
    )


def _size_and_crop(config: Mapping[str, Any]) -> tuple[Any, tuple[int, int] | None]:
    size = _size(config.get("size", 224), square=config.get("default_to_square", True))
    crop = _size(config["crop_size"], square=True) if config.get("do_center_crop") else None
    if config.get("crop_pct") is None or not config.get("do_resize", True):
        return size, crop
    # ConvNeXT's: resize to more than what is wanted and crop it.
    side = size if isinstance(size, int) else size[0]
    if side >= _WARP_FROM:
        return (side, side), crop
    return int(side / config["crop_pct"]), (side, side)


def _size(value: Any, *, square: bool) -> tuple[int, int] | int:
    """Older files have a number where newer ones name the sides."""
    if isinstance(value, Mapping):
        if "shortest_edge" in value:
            return value["shortest_edge"]
        return value["height"], value["width"]
    if isinstance(value, int):
        return (value, value) if square else value
    return tuple(value)


def _numbers(value: Any) -> tuple[float, ...] | float:
    return tuple(map(float, value)) if isinstance(value, list) else float(value)


def preprocessing_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The preprocessor_config.json of a preprocessing, which transformers reads too."""

    def named(size: tuple[int, int] | int) -> dict[str, int]:
        if isinstance(size, int):
            return {"shortest_edge": size}
        return dict(zip(("height", "width"), size, strict=True))

    config = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": preprocessing.size is not None,
        "resample": _FILTERS[preprocessing.resample],
        "do_center_crop": preprocessing.crop is not None,
        "do_rescale": True,
        "rescale_factor": preprocessing.scale,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
    }
    if preprocessing.size is not None:
        config["size"] = named(preprocessing.size)
    if preprocessing.crop is not None:
        config["crop_size"] = named(preprocessing.crop)
    return config
