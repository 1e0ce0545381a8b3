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
      start: of its data in the file, in bytes.
      dtype: by its name in the file.
      shape: of the tensor.
    """

    def __init__(self, path: Path, start: int, dtype: str, shape: list[int]):
        self._path, self._start = path, start
        self._dtype, self._shape = np.dtype(_DTYPES[dtype]), shape

    def get_shape(self) -> list[int]:
        """Sizes of the axes."""
        return self._shape

    def __getitem__(self, index: Any) -> np.ndarray:
        count = int(np.prod(self._shape))
        whole = np.fromfile(self._path, self._dtype, count, offset=self._start)
        return whole.reshape(self._shape)[index].astype(np.float32)


def float8_tensors(path: Path) -> dict[str, Float8Tensor]:
    """The tensors of eight bits in a safetensors file that was found whole, by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Float8Tensor(path, 8 + length + entry["data_offsets"][0], dtype, entry["shape"])
        for name, entry in header.items()
        if (dtype := entry["dtype"]) in _DTYPES
    }


class _Scaled:
    """A tensor times the scales of its blocks."""

    def __init__(self, values: Any, scales: Any, block: tuple[int, int]):
        self._values, self._scales, self._block = values, scales, block

    def get_shape(self) -> list[int]:
        return self._values.get_shape()

    def __getitem__(self, index: Any) -> np.ndarray:
        values, scales = (np.array(a[...], np.float32) for a in (self._values, self._scales))
        if scales.size == 1:
            values *= scales.reshape(())
            return values[index]
        # A row of blocks at a time: the whole may have half a gigabyte, and the scales as much.
        rows, columns = self._block
        for i in range(scales.shape[-2]):
            row = np.repeat(scales[..., i : i + 1, :], columns, axis=-1)
            values[..., i * rows : (i + 1) * rows, :] *= row[..., : values.shape[-1]]
        return values[index]


def with_scales(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a folder, those that have scales multiplied by them when sliced.

    Args:
      tensors: by name, as `folder.open_tensors` gives them.
      config: the folder's config.json.

    Returns:
      All tensors but the scales.

    Raises:
      ValueError: the weights are quantised in another way, scales are missing or are not one
        for each block, or config.json makes no sense.
    """
    quantised, block = _read_config(config.get("quantization_config"))
    scales = {name for name in tensors if name.endswith(_SCALE) and name[: -len(_SCALE)] in tensors}
    found, faults = {}, []
    for name, tensor in tensors.items():
        if name in scales:
            continue
        found[name] = tensor
        if name + _SCALE in scales:
            found[name] = _Scaled(tensor, tensors[name + _SCALE], block)
            faults += _misfits(name, tensor, tensors[name + _SCALE], block)
        elif quantised and isinstance(tensor, Float8Tensor):
            faults.append(f"{name} has eight bits, but there is no {name}{_SCALE}")
    if faults:
        raise ValueError(
            f"load_pretrained: scales are not one for each block of {block}, the "
            f"weight_block_size of config.json:\n  " + "\n  ".join(sorted(faults))
        )
    return found


def _read_config(entry: Any) -> tuple[bool, tuple[int, int]]:
    """Whether weights are quantised, and the size of the blocks."""
    if entry is None:
        return False, (128, 128)
    if not isinstance(entry, Mapping) or (method := entry.get("quant_method")) != "fp8":
        method = method if isinstance(entry, Mapping) else entry
        raise ValueError(
            f"load_pretrained: the weights are quantised by quant_method={method!r}; only 'fp8' "
            f"with scales of blocks is read, or weights that are not quantised"
        )
    block = entry.get("weight_block_size") or [128, 128]
    sizes = block if isinstance(block, list | tuple) else [block]
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"load_pretrained: weight_block_size={block!r} of config.json is not two positive "
            f"numbers"
        )
    return True, tuple(sizes)


def _misfits(name: str, values: Any, scales: Any, block: tuple[int, int]) -> list[str]:
    shape, grid = tuple(values.get_shape()), tuple(scales.get_shape())
    if grid in ((), (1,)):
        return []
    blocks = [-(-size // part) for size, part in zip(shape[-2:], block, strict=len(shape) > 1)]
    expected = (*shape[:-2], *blocks)
    if len(shape) > 1 and grid == expected:
        return []
    return [f"{name}{_SCALE} {grid}, expected {expected} for {shape}"]
