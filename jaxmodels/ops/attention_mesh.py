"""Attention spread over the devices of a mesh: examples, heads and, in a ring, the sequence."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxmodels.ops.attention_fused import KERNELS
from jaxmodels.ops.mesh_axes import AXES, axis_size, batch_axes
from jaxmodels.ops.ring_attention import ring_attention


def attend_on_mesh(
    attend: Callable[..., Array],
    q: Float[Array, "N T H K"],
    k: Float[Array, "N S G K"],
    v: Float[Array, "N S G V"],
    bias: Array | None,
    mask: Array | None,
    segment_ids: tuple[Array, Array] | None,
    sinks: Array | None,
    **options,
) -> Float[Array, "N T H V"]:
    """Attention of each device to its examples and heads, which need no others.

    XLA does not see that from a loop over blocks or a kernel, and would gather. A
    sequence split over `sequence` goes round a ring; with a bias, a mask, a window or
    other keys than the queries' own, it is gathered instead.

    Args:
      attend: an implementation, such as `blocked_attention`.
      q, k, v, bias, mask, segment_ids, sinks, **options: as of that.

    Returns:
      As `attend`, which is called as it is where there is no mesh.
    """
    axes = {name for name in AXES if axis_size(name) > 1}
    if not axes:
        return attend(q, k, v, bias, mask, segment_ids, sinks, **options)
    examples, heads = batch_axes(len(q)) or None, None
    groups = math.lcm(k.shape[2], axis_size("tensor"))
    if axis_size("tensor") > 1 and q.shape[2] % groups == 0:
        # Fewer key heads than devices: some have the same.
        heads, copies = "tensor", groups // k.shape[2]
        k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
    along = None
    num_queries = q.shape[1]
    if "sequence" in axes and _ring_fits(q, k, bias, mask, options["window"]):
        along, attend = "sequence", _in_ring
        q, k, v, segment_ids = _filled_up(axis_size("sequence"), q, k, v, segment_ids)

    def pairs(x):
        sizes = (examples, heads)
        return (
            None
            if x is None
            else PartitionSpec(
                *(axis if size > 1 else None for axis, size in zip(sizes, x.shape, strict=False))
            )
        )

    # The kernels of platforms do not say over which axes their results vary.
    says_axes = all(attend is not kernel.attend for kernel in KERNELS.values())
    tokens, ids = PartitionSpec(examples, along, heads), PartitionSpec(examples, along)
    out = jax.shard_map(
        partial(attend, **options),
        in_specs=(tokens, tokens, tokens, pairs(bias), pairs(mask), ids, PartitionSpec(heads)),
        out_specs=tokens,
        axis_names=axes,
        check_vma=says_axes,
    )(q, k, v, bias, mask, segment_ids, sinks)
    return out[:, :num_queries]


def _ring_fits(q, k, bias, mask, window) -> bool:
    alike = bias is None and mask is None and window[0] is None and window[1] in (None, 0)
    return alike and q.shape[1] == k.shape[1] >= axis_size("sequence")


def _filled_up(parts, q, k, v, segment_ids):
    """To a length that divides, by tokens of a document of their own."""
    missing = -q.shape[1] % parts
    if not missing:
        return q, k, v, segment_ids
    if segment_ids is None:
        segment_ids = (jnp.zeros(q.shape[:2], jnp.int32),) * 2
    others = jnp.min(segment_ids[0], axis=1, keepdims=True) - 1
    ids = jnp.concatenate([segment_ids[0], jnp.repeat(others, missing, axis=1)], axis=1)
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    return q, k, v, (ids, ids)


def _in_ring(q, k, v, bias, mask, segment_ids, sinks, *, window, scale, softcap):
    return ring_attention(
        q,
        k,
        v,
        causal=window[1] == 0,
        segment_ids=None if segment_ids is None else segment_ids[0],
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )
