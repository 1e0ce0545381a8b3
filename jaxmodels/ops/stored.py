"""A fence in a program for CPUs: what lies before it is not computed again after it."""

from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from jaxmodels.ops.mesh_axes import AXES, axis_size
from jaxmodels.ops.platform import platform


def stored(array: Array) -> Array:
    """The same array, on a CPU in a piece of memory of its own, its axes in this order.

    XLA joins what makes an array with what reads it, and turns its axes to its own
    liking; `lax.optimization_barrier` is gone before it does. Either can be ten times
    slower than to write the array once. Elsewhere, and on a mesh, where XLA would
    gather the array from all devices first, this does nothing.
    """
    if platform() != "cpu" or axis_size(*AXES) > 1:
        return array
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))
