"""Experts that lie on many devices: tokens travel to the experts they chose, and back."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmodels.ops.experts import dropless_experts, sorted_swiglu
from jaxmodels.ops.mesh_axes import AXES, axis_size, batch_axes, vary_alike
from jaxmodels.ops.routing import expert_load


def expert_parallel(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    axis_name: str = "expert",
) -> Float[Array, "N D"]:
    """`ops.experts.dropless_experts` inside a `shard_map` that splits experts and tokens.

    An all-to-all sends each device the tokens that chose its experts, with how many
    chose which; it sorts what has come, and a second all-to-all brings the results
    back. None is dropped, so there is room for all of a device's N K pairs at every
    other: P N K rows are sent and held by P devices, of which N K are real. Work is
    done for real ones alone.

    Args:
      x: the device's tokens.
      weights, experts: from `routing.top_k_routing`; numbers of all experts.
      gate, up, down: the matrices of the device's E experts, which are the p-th E of
        all on device p.
      axis_name: of the mesh axis that experts and tokens are split over.

    Returns:
      An array of x's shape and dtype.

    Source: Lepikhin et al. 2020, "GShard", section 3.2 (arXiv:2006.16668), without its
    capacity.
    """
    devices, width = lax.axis_size(axis_name), x.shape[1]
    choices = experts.ravel()
    order = jnp.argsort(choices, stable=True)
    # Sorted by expert, what goes to a device lies together.
    load = expert_load(choices, devices * len(gate)).reshape(devices, -1)
    counts = load.sum(axis=1)
    starts = jnp.cumsum(counts) - counts
    slots = starts[:, None] + jnp.arange(len(choices))[None, :]
    pairs = order[jnp.minimum(slots, len(choices) - 1)]
    sent = x[pairs // experts.shape[1]]

    def exchange(a):
        return lax.all_to_all(a, axis_name, split_axis=0, concat_axis=0)

    rows, incoming = exchange(sent), exchange(load)
    mixed = _local(rows.reshape(-1, width), incoming, gate, up, down)
    back = exchange(mixed.reshape(rows.shape))
    owner = choices // len(gate)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    out = back[owner, places - starts[owner]].reshape(*experts.shape, width)
    return jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), out)


def _local(rows, incoming, gate, up, down):
    """The device's experts on rows that came sorted from every device, and filled up."""
    devices, num_experts = incoming.shape
    ends = jnp.cumsum(incoming, axis=1)
    slots = jnp.arange(len(rows) // devices)
    expert = jnp.sum(slots[None, :, None] >= ends[:, None, :], axis=-1).ravel()
    # What is no row has the number after the last expert.
    order = jnp.argsort(expert, stable=True)
    load = incoming.sum(axis=0)
    out = sorted_swiglu(*vary_alike((rows[order], load, gate, up, down)))
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    return jnp.where((expert < num_experts)[:, None], out[places], 0)


def dropless_on_mesh(
    x: Float[Array, "*B D"],
    weights: Float[Array, "*B K"],
    experts: Int[Array, "*B K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "*B D"]:
    """`dropless_experts` of any leading axes; on a mesh, tokens are left on their devices.

    Sorting all tokens by expert would gather them; each device sorts its own. Experts
    lie along `expert`, each with its hidden units along `tensor`.

    Args:
      x, weights, experts, gate, up, down: as of `dropless_experts`, of all devices.

    Returns:
      An array of x's shape and dtype.

    Source: as `expert_parallel`.
    """

    def flat(run, x, weights, experts, *matrices):
        tokens = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
        return run(*tokens, *matrices).reshape(x.shape)

    axes = {name for name in AXES if axis_size(name) > 1}
    examples = batch_axes(len(x)) or None
    if not axes or not examples:
        return flat(dropless_experts, x, weights, experts, gate, up, down)
    split = "expert" if "expert" in axes and len(gate) % axis_size("expert") == 0 else None
    units = "tensor" if "tensor" in axes and gate.shape[2] % axis_size("tensor") == 0 else None
    along = "sequence" in axes and x.ndim == 3 and x.shape[1] % axis_size("sequence") == 0

    def on_device(*arguments):
        run = expert_parallel if split else dropless_experts
        out = flat(run, *vary_alike(arguments))
        return lax.psum(out, "tensor") if units else out

    tokens = PartitionSpec(examples, "sequence") if along else PartitionSpec(examples)
    inward, outward = PartitionSpec(split, None, units), PartitionSpec(split, units)
    return jax.shard_map(
        on_device,
        in_specs=(tokens, tokens, tokens, inward, inward, outward),
        out_specs=tokens,
        axis_names=axes,
    )(x, weights, experts, gate, up, down)
