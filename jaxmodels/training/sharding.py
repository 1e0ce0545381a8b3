"""Where arrays live: a mesh given as text, and rules from parameter paths to axes.

Models know nothing of this; it is decided here and XLA does the rest. Attention,
recurrences and experts ask which mesh they are traced for (`ops.mesh_axes`), because
XLA alone would gather what they can leave apart.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxmodels.ops.mesh_axes import AXES, BATCH_AXES
from jaxmodels.training.tensor_rules import named_axes

Rules = Sequence[tuple[str, PartitionSpec]]

# Below this many elements the all-gather costs more than the copy saves.
_SMALLEST_SHARDED = 1024


def make_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a device mesh from a text such as `"data=2,fsdp=2,tensor=2"`.

    data      splits the batch and copies parameters
    fsdp      splits the batch and the parameters, gradients and optimizer state
    expert    splits the batch and the experts; tokens travel to theirs and back
    sequence  splits time, the second axis of the batch, in a ring or by passing states
    tensor    splits matrices by columns and rows (`training.tensor_rules`)

    However it is written, the order of the axes is this one, and devices with
    neighbouring numbers are neighbours along the last, which talks the most.

    Args:
      text: comma-separated `axis=size`; empty means all devices on `data`.
      devices: by default all of them.

    Raises:
      ValueError: unknown axis, malformed text, or sizes whose product is not
        the number of devices.

    Source: fsdp is Rajbhandari et al. 2020, "ZeRO", stage 3 (arXiv:1910.02054).
    """
    devices = jax.devices() if devices is None else devices
    sizes = _parse(text) if text else {"data": len(devices)}
    product = math.prod(sizes.values())
    if product != len(devices):
        near = ",".join(f"{axis}={size}" for axis, size in _nearest(sizes, len(devices)).items())
        raise ValueError(
            f"make_mesh: {text!r} asks for {product} devices but there are {len(devices)}; "
            f"for instance {near!r} fits"
        )
    ordered = {axis: sizes[axis] for axis in AXES if axis in sizes}
    return Mesh(np.asarray(devices).reshape(tuple(ordered.values())), tuple(ordered))


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


def _nearest(sizes: dict[str, int], count: int) -> dict[str, int]:
    """The same axes with sizes that fit, by the least factors; a tie changes the first axis."""

    def factorisations(number, parts):
        if parts == 1:
            return [(number,)]
        divisors = (n for n in range(1, number + 1) if number % n == 0)
        return [(n, *rest) for n in divisors for rest in factorisations(number // n, parts - 1)]

    def distance(found):
        factors = [abs(math.log(a / b)) for a, b in zip(found, sizes.values(), strict=True)]
        return round(sum(factors), 6), factors[::-1]

    best = min(factorisations(count, len(sizes)), key=distance)
    return dict(zip(sizes, best, strict=True))


def path_name(path: Sequence[Any]) -> str:
    """`a/b/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """The sharding of every array of a tree, decided by its path and shape.

    The first rule whose pattern is found in the path wins. Without one, `tensor`
    and `expert` split the axes that the layer's name says (`training.tensor_rules`),
    and `fsdp` the longest other one that divides. An array is copied along an axis
    of the mesh where none does, and along `fsdp` where it is small.

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
        spec = _by_name(name, leaf.shape, mesh) if spec is None else _present(spec, mesh)
        _check_divides(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, tree)


def _by_name(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = list(named_axes(name, shape, mesh.shape))
    parts = mesh.shape.get("fsdp", 1)
    free = [i for i, size in enumerate(shape) if axes[i] is None and size % parts == 0]
    if parts > 1 and free and np.prod(shape) >= _SMALLEST_SHARDED:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _present(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(*[axis if axis in mesh.shape else None for axis in spec])


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for i, axis in enumerate(spec):
        if axis is not None and (i >= len(shape) or shape[i] % mesh.shape[axis]):
            raise ValueError(
                f"tree_shardings: {name} of shape {shape} cannot be split as {spec}: axis {i} "
                f"does not divide by {axis}={mesh.shape[axis]}; change the rule or the mesh"
            )


def check_axes_used(shardings: Any, mesh: Mesh) -> None:
    """Raises if `tensor` or `expert` would only repeat the same work on more devices.

    The other axes split the batch, which `shard_batch` checks.

    Args:
      shardings: of a state, from `tree_shardings`.
      mesh: that they are for.

    Raises:
      ValueError: nothing is split over one of these axes.
    """
    parts = [part for leaf in jax.tree.leaves(shardings) for part in leaf.spec]
    used = {axis for part in parts for axis in (part if isinstance(part, tuple) else (part,))}
    for axis in ("tensor", "expert"):
        if mesh.shape.get(axis, 1) > 1 and axis not in used:
            raise ValueError(
                f"check_axes_used: no parameter is split over {axis}={mesh.shape[axis]}, so its "
                f"devices would all do the same; give {axis}'s devices to data or fsdp, or pass "
                f"rules (see training.tensor_rules for the layers that have some)"
            )


@contextlib.contextmanager
def placed_on(placement: Iterable[Sharding] | None) -> Iterator[None]:
    """While tracing, tells `ops` which mesh a computation is for.

    Args:
      placement: of a `TrainState`; None, or one device, changes nothing.
    """
    first = next(iter(placement or ()), None)
    if not isinstance(first, NamedSharding) or first.mesh.size == 1:
        yield
        return
    with jax.sharding.use_abstract_mesh(first.mesh.abstract_mesh):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over every axis of the mesh that carries data."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the devices of a mesh.

    The leading axis of every array is split over `data`, `fsdp` and `expert`, and the
    second over `sequence`, where it divides. Images and videos are not: their patches
    are, where a model attends to them. Every process passes its own part; together
    the parts are the batch.

    Args:
      batch: a tree of NumPy arrays with a common leading axis.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the leading axis does not divide by the number of parts, there are
        sequences of which none divides by `sequence`, or more processes than parts.
    """
    sharding = batch_sharding(mesh)
    parts = _parts_of_a_process(mesh)
    sequence = mesh.shape.get("sequence", 1)
    _check_second_axis(batch, sequence)

    def put(path, leaf):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"shard_batch: batch[{path_name(path)}] has {leaf.shape[0]} examples, which do "
                f"not divide over {parts} devices; use a batch size that is a multiple of {parts}"
            )
        spec = sharding.spec
        if sequence > 1 and _is_sequence(leaf.shape) and leaf.shape[1] % sequence == 0:
            spec = PartitionSpec(*spec, "sequence")
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), leaf)

    return jax.tree.map_with_path(put, batch)


def _parts_of_a_process(mesh: Mesh) -> int:
    parts, processes = (
        math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES),
        len({device.process_index for device in mesh.devices.flat}),
    )
    if parts % processes:
        raise ValueError(
            f"shard_batch: {processes} processes each read a part of the batch, but the mesh "
            f"{dict(mesh.shape)} has {parts}; make data times fsdp times expert a multiple of "
            f"{processes}"
        )
    return parts // processes


def _is_sequence(shape: tuple[int, ...]) -> bool:
    """Of tokens or of vectors; not rows of pixels.

    XLA (of JAX 0.10) multiplies the gradient of a convolution's kernel by the number of
    copies of the batch where rows are split.
    """
    return len(shape) in (2, 3)


def _check_second_axis(batch: Any, sequence: int) -> None:
    shapes = {path_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(batch)}
    lengths = [shape[1] for shape in shapes.values() if _is_sequence(shape)]
    if lengths and all(length % sequence for length in lengths):
        raise ValueError(
            f"shard_batch: sequence={sequence} divides the second axis of nothing in the batch "
            f"{shapes}; use a length that is a multiple of it, or another mesh"
        )
