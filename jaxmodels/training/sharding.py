"""Where arrays live: a mesh given as text, and rules from parameter paths to axes.

Models know nothing of this; it is decided here and XLA does the rest.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
Rules = Sequence[tuple[str, PartitionSpec]]

# Below this many elements the all-gather costs more than the copy saves.
_SMALLEST_SHARDED = 1024


def make_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a device mesh from a text such as `"data=2,fsdp=4"`.

    `data` splits the batch and copies parameters; `fsdp` splits the batch and
    the parameters, gradients and optimizer state.

    Args:
      text: comma-separated `axis=size`; empty means all devices on `data`.
      devices: by default all of them.

    Raises:
      ValueError: unknown axis, malformed text, or sizes whose product is not
        the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _parse(text) if text else {"data": len(devices)}
    product = int(np.prod(list(sizes.values())))
    if product != len(devices):
        raise ValueError(
            f"make_mesh: {text!r} asks for {product} devices but there are {len(devices)}; "
            f"for instance 'data={len(devices)}' fits"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes))


def _parse(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"make_mesh: cannot read {part!r} in {text!r}; write axis=size pairs such as "
                f"'data=2,fsdp=4' with axes from {', '.join(AXES)}, each once"
            )
        sizes[axis] = int(size)
    return sizes


def path_name(path: Sequence[Any]) -> str:
    """`a/b/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """The sharding of every array of a tree, decided by its path and shape.

    The first rule whose pattern is found in the path wins. Without one, an
    array is split over `fsdp` along its longest axis that divides, and copied
    when there is none, when it is small, or when the mesh has no such axis.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: from `make_mesh`.
      rules: pairs of a regular expression and a `PartitionSpec`; axes the mesh
        does not have are dropped, so one set of rules serves every mesh.

    Raises:
      ValueError: a rule splits an axis that does not divide.
    """

    def place(path, leaf):
        name = path_name(path)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        spec = _longest_axis(leaf.shape, mesh) if spec is None else _present(spec, mesh)
        _check_divides(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, tree)


def _longest_axis(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape.get("fsdp", 1)
    fitting = [i for i, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not fitting or np.prod(shape) < _SMALLEST_SHARDED:
        return PartitionSpec()
    longest = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*[None] * longest, "fsdp")


def _present(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(*[axis if axis in mesh.shape else None for axis in spec])


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for i, axis in enumerate(spec):
        if axis is not None and (i >= len(shape) or shape[i] % mesh.shape[axis]):
            raise ValueError(
                f"tree_shardings: {name} of shape {shape} cannot be split as {spec}: axis {i} "
                f"does not divide by {axis}={mesh.shape[axis]}; change the rule or the mesh"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over every axis of the mesh that carries data."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in AXES if a in mesh.shape)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the devices of a mesh, split along its leading axis.

    Every process passes its own part; together the parts are the batch.

    Args:
      batch: a tree of NumPy arrays with a common leading axis.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the leading axis does not divide by the number of parts.
    """
    sharding = batch_sharding(mesh)
    parts = mesh.size // jax.process_count()

    def put(path, leaf):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"shard_batch: batch[{path_name(path)}] has {leaf.shape[0]} examples, which do "
                f"not divide over {parts} devices; use a batch size that is a multiple of {parts}"
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map_with_path(put, batch)
