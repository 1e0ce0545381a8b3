"""Mapping tables: one row per parameter says where it lives and how it lies, both ways."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of theirs becomes one of ours, and back.

    Attributes:
      read: from their array to ours.
      write: from our array and the model to their array.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray, nn.Module], np.ndarray]


SAME = Layout(read=lambda a: a, write=lambda a, model: a)
# PyTorch's Linear keeps (out, in), Flax's Dense (in, out).
LINEAR = Layout(read=lambda a: a.T, write=lambda a, model: a.T)
# A convolution over whole patches, (D, C, P, P), is one matrix (P * P * C, D) here.
PATCHES = Layout(
    read=lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
    write=lambda a, model: a.reshape(model.patch_size, model.patch_size, -1, a.shape[-1]).transpose(
        3, 2, 0, 1
    ),
)
# Convolutions: (out, in, KY, KX) there, (KY, KX, in, out) here.
CONVOLUTION = Layout(
    read=lambda a: a.transpose(2, 3, 1, 0), write=lambda a, model: a.transpose(3, 2, 0, 1)
)


def leading_axes(count: int) -> Layout:
    """Theirs has `count` more axes of length one in front."""
    return Layout(
        read=lambda a: a.reshape(a.shape[count:]),
        write=lambda a, model: a.reshape((1,) * count + a.shape),
    )


def trailing_axes(count: int) -> Layout:
    """Theirs has `count` more axes of length one at the end."""
    return Layout(
        read=lambda a: a.reshape(a.shape[: a.ndim - count]),
        write=lambda a, model: a.reshape(a.shape + (1,) * count),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and its place in the other world.

    Attributes:
      ours: path in our tree, joined by slashes; or several, whose last axes theirs
        joins in equal parts.
      theirs: name of the tensor; `{block}` counts the blocks, which are stacked
        along the first axis of ours. Or the names of all parts of such a stack.
      layout: how the two differ.
      tied: every block holds a copy of one tensor of ours, which is not stacked.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    layout: Layout = SAME
    tied: bool = False

    def names(self, model: nn.Module) -> list[str]:
        """Their names of all parts of ours, or the one name."""
        if isinstance(self.theirs, tuple):
            return list(self.theirs)
        if "{block}" not in self.theirs:
            return [self.theirs]
        return [self.theirs.format(block=block) for block in range(model.depth)]

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading axis of parts."""
        if isinstance(self.theirs, tuple):
            return True
        return "{block}" in self.theirs and not self.tied


def dense(ours: str, theirs: str, *, bias: bool = True, tied: bool = False) -> list[Row]:
    """Rows of a linear map."""
    kernel = Row(f"{ours}/kernel", f"{theirs}.weight", LINEAR, tied)
    return [kernel, Row(f"{ours}/bias", f"{theirs}.bias", tied=tied)] if bias else [kernel]


def affine(ours: str, theirs: str) -> list[Row]:
    """Rows of a norm's gain and offset."""
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def export_tensors(rows: list[Row], params: Mapping, model: nn.Module) -> dict[str, np.ndarray]:
    """Our parameters under their names and in their layout, as views where possible."""
    flat = flatten_dict(params, sep="/")
    tensors = {}
    for row in rows:
        if isinstance(row.ours, tuple):
            array = np.concatenate([np.asarray(flat[path]) for path in row.ours], axis=-1)
        else:
            array = np.asarray(flat[row.ours])
        for block, name in enumerate(row.names(model)):
            tensors[name] = row.layout.write(array[block] if row.stacked else array, model)
    return tensors


def import_tensors(rows: list[Row], tensors: Mapping[str, Any], model: nn.Module) -> dict:
    """Their tensors, already known to be complete, as our parameters in float32.

    Raises:
      ValueError: copies that should be equal differ; all of them are named.
    """
    flat, untied = {}, []
    for row in rows:
        names = row.names(model)
        parts = (_read(tensors[name], row.layout) for name in names)
        if isinstance(row.ours, tuple):
            joined = np.split(next(parts), len(row.ours), axis=-1)
            flat |= dict(zip(row.ours, joined, strict=True))
            continue
        if row.stacked:
            flat[row.ours] = np.stack(list(parts))
            continue
        flat[row.ours] = first = next(parts)
        untied += [
            name
            for name, part in zip(names[1:], parts, strict=True)
            if not np.array_equal(first, part)
        ]
    if untied:
        raise ValueError(
            f"load_pretrained: the model shares one timestep and one label embedding between all "
            f"blocks, but these tensors differ from those of block 0: {', '.join(untied)}"
        )
    return unflatten_dict(flat, sep="/")


def _read(tensor: Any, layout: Layout) -> np.ndarray:
    return np.ascontiguousarray(layout.read(tensor[:]), dtype=np.float32)


def expected_tensors(rows: list[Row], shapes: Mapping, model: nn.Module) -> dict[str, tuple]:
    """Shapes of all their tensors for parameters of ours of these shapes; no memory is used."""
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    return {name: a.shape for name, a in export_tensors(rows, empty, model).items()}


def check_shapes(where: str, expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    """Compares two sets of named shapes.

    Args:
      where: start of the message: the function and the thing that was read.
      expected: what the model needs.
      found: what is there.

    Raises:
      ValueError: one message with all missing, extra and misshapen names.
    """
    faults = [f"missing {name} {expected[name]}" for name in sorted({*expected} - {*found})]
    faults += [f"extra {name} {found[name]}" for name in sorted({*found} - {*expected})]
    faults += [
        f"misshapen {name}: {found[name]}, expected {expected[name]}"
        for name in sorted({*expected} & {*found})
        if tuple(expected[name]) != tuple(found[name])
    ]
    if faults:
        raise ValueError(f"{where} does not fit the model:\n  " + "\n  ".join(faults))
