"""The names of a mesh's axes, and which of them a computation may spread over.

A model does not know devices. Its operations ask JAX which mesh a computation is
traced for (`jax.set_mesh`, or `training.make_step` for a state that lies on a
mesh), as they ask which platform it will run on (`ops.platform`), and where there
is none they compute as ever.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

# From the outermost to the innermost: neighbours on the last axes talk the most.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
# Those along which examples are split.
BATCH_AXES = ("data", "fsdp", "expert")


def axis_size(*names: str) -> int:
    """Into how many parts the mesh of this trace splits along these axes together.

    1 where there is no mesh, no such axis, or where the caller is inside a
    `shard_map` or `pmap` over it and has its part already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return math.prod(mesh.shape[n] for n in names if kinds.get(n) == AxisType.Auto)


def batch_axes(examples: int) -> tuple[str, ...]:
    """The axes that examples are split over; none if there are too few to divide."""
    present = tuple(name for name in BATCH_AXES if axis_size(name) > 1)
    return present if examples % axis_size(*present) == 0 else ()


def for_each_token(function: Callable[[Array], Any], x: Array) -> Any:
    """`function(x)` of a function that treats what lies along the leading axes alone.

    For operations that XLA would gather all tokens for, though none needs another.

    Args:
      function: takes and gives arrays whose leading axes are x's; keeps the last apart.
      x: (B, D), or (B, T, ..., D) with time that may be split.

    Returns:
      What the function returns.
    """
    examples = batch_axes(len(x)) if x.ndim > 1 else ()
    parts = axis_size("sequence")
    along = x.ndim > 2 and parts > 1 and x.shape[1] % parts == 0
    axes = examples + ("sequence",) * along
    if not axes:
        return function(x)
    spec = PartitionSpec(examples or None, *("sequence",) * along)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names=set(axes))(x)


def vary_alike(arrays: Any) -> Any:
    """Makes all arrays of a tree vary over the same axes of an enclosing `shard_map`.

    The gradient of one that is shared between devices is then summed over them.
    """

    def axes(x):
        return jax.typeof(x).manual_axis_type.varying

    everywhere = frozenset().union(*map(axes, jax.tree.leaves(arrays)))

    def vary(x):
        missing = tuple(everywhere - axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arrays)
