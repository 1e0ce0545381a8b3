"""Weights published in eight bits with a scale for each block: DeepSeek-V3, Qwen3's FP8 folders.

The scale of a tensor `name` is another, `name_scale_inv`, by which it is multiplied, and
config.json tells the size of the blocks.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
}
_SCALE = "_scale_inv"


class Float8Tensor:
    """A tensor of eight bits in a file, read only when sliced.

    Has the two methods of a slice of safetensors, whose NumPy reader does not know these
    numbers.

    Args:
      path: of a safetensors file that was found whole.
      name: of the tensor in it.
    """

    def __init__(self, path: Path, name: str):
        self._path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))[name]
        self._start = 8 + length + header["data_offsets"][0]
        self._dtype, self._shape = np.dtype(_DTYPES[header["dtype"]]), header["shape"]

    @staticmethod
    def reads(dtype: str) -> bool:
        """Whether a dtype, by its name in the file, is one of eight bits."""
        return dtype in _DTYPES

    def get_shape(self) -> list[int]:
        """Sizes of the axes."""
        return self._shape

    def __getitem__(self, index: Any) -> np.ndarray:
        count = int(np.prod(self._shape))
        whole = np.fromfile(self._path, self._dtype, count, offset=self._start)
        return whole.reshape(self._shape)[index].astype(np.float32)


class _Scaled:
    """A tensor times the scales of its blocks."""

    def __init__(self, values: Any, scales: Any, block: tuple[int, int]):
        self._values, self._scales, self._block = values, scales, block

    def get_shape(self) -> list[int]:
        return self._values.get_shape()

    def __getitem__(self, index: Any) -> np.ndarray:
        values, scales = (np.asarray(a[...], np.float32) for a in (self._values, self._scales))
        if scales.size > 1:
            rows, columns = values.shape[-2:]
            scales = np.repeat(scales, self._block[0], axis=-2)[..., :rows, :]
            scales = np.repeat(scales, self._block[1], axis=-1)[..., :columns]
        return (values * scales)[index]


def with_scales(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a folder, those that have scales multiplied by them when sliced.

    Args:
      tensors: by name, as `folder.open_tensors` gives them.
      config: the folder's config.json.

    Returns:
      All tensors but the scales.

    Raises:
      ValueError: the weights are quantised in another way, or scales are not one for each
        block.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "fp8")
    if method != "fp8":
        raise ValueError(
            f"load_pretrained: the weights are quantised by quant_method={method!r}; only 'fp8' "
            f"with scales of blocks is read, or weights that are not quantised"
        )
    block = tuple(quantization.get("weight_block_size") or (128, 128))
    scales = {name for name in tensors if name.endswith(_SCALE) and name[: -len(_SCALE)] in tensors}
    found, faults = {}, []
    for name in tensors.keys() - scales:
        found[name] = tensors[name]
        if name + _SCALE in scales:
            found[name] = _Scaled(tensors[name], tensors[name + _SCALE], block)
            faults += _misfits(name, tensors[name], tensors[name + _SCALE], block)
    if faults:
        raise ValueError(
            f"load_pretrained: scales are not one for each block of {block}, the "
            f"weight_block_size of config.json:\n  " + "\n  ".join(sorted(faults))
        )
    return found


def _misfits(name: str, values: Any, scales: Any, block: tuple[int, int]) -> list[str]:
    shape, grid = tuple(values.get_shape()), tuple(scales.get_shape())
    if np.prod(grid, dtype=int) == 1:
        return []
    blocks = (-(-size // part) for size, part in zip(shape[-2:], block, strict=True))
    expected = (*shape[:-2], *blocks)
    return [] if grid == expected else [f"{name}{_SCALE} {grid}, expected {expected} for {shape}"]
