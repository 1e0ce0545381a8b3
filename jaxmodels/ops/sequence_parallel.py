"""Recurrences over a sequence that lies on many devices, by passing states instead of tokens.

Every linear recurrence of `ops` takes the state before a part of the sequence to the
state after it by an affine map, S -> A S + B, and to each output likewise. A device
finds A and B of its part without knowing S, all devices exchange them, and each
composes those before its own. What is sent does not grow with the sequence.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmodels.ops.mesh_axes import axis_size


def pass_states(
    form: Callable[..., tuple[Array, Array]],
    axis_name: str,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    *rest: Array | None,
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a recurrence inside a `shard_map` that splits the sequence over an axis.

    S_after = A S_before + B,   out_t = r_t^T S_before + out_t alone

    Whatever the gates are, A and r come of the form itself: values of zero and a
    state of I give A as the state after and r_t as the outputs, and so K more columns
    of values do it in the same pass. That is (K + V) / V of the work of one device's
    part, and the exchange is of P matrices K by K + V a head.

    Args:
      form: as `ops.recurrence.run_recurrence` takes it: causal, and linear in v and state.
      axis_name: of the mesh axis that the sequence is split over.
      q, k, v: the device's part; parts lie in the order of the devices.
      *rest: its gates, and last the state before the first token of all, the same
        on every device.
      segment_ids: of the device's part.
      chunk_size: of the form.

    Returns:
      The device's outputs, and the state after the last token of all, the same on
      every device.

    Source: Sun et al. 2024, "Linear Attention Sequence Parallelism"
    (arXiv:2404.02882), with an all-gather instead of a ring as in Sun et al. 2025,
    "LASP-2" (arXiv:2502.07563); from decays to any gate by the identity.
    """
    *gates, state = rest
    width, values = q.shape[-1], v.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(width, dtype=state.dtype), (*state.shape[:-1], width))
    alone, after = form(
        q,
        k,
        jnp.concatenate([v, jnp.zeros_like(q)], axis=-1),
        *gates,
        _varying(axis_name, jnp.concatenate([jnp.zeros_like(state), identity], axis=-1)),
        segment_ids,
        chunk_size,
    )
    goes_on = _goes_on(axis_name, segment_ids)
    if goes_on is not None:
        keep = jnp.concatenate(
            [jnp.ones((len(goes_on), values)), jnp.repeat(goes_on[:, None], width, axis=1)], axis=1
        )
        alone, after = alone * keep[:, None, None], after * keep[:, None, None]

    def compose(state, part):
        return part[..., values:] @ state + part[..., :values], state

    parts = lax.all_gather(after, axis_name)
    last, before = lax.scan(compose, _varying(axis_name, state), parts)
    here = lax.axis_index(axis_name)
    out = alone[..., :values] + jnp.einsum("bthk,bhkv->bthv", alone[..., values:], before[here])
    # All have found the same last state, which JAX only believes of a sum.
    return out, lax.psum(jnp.where(here == 0, last, 0.0), axis_name)


def _goes_on(axis_name: str, segment_ids: Array | None) -> Float[Array, "B"] | None:
    """1 where the device's first token is of the document before it, else 0."""
    if segment_ids is None:
        return None
    size = lax.axis_size(axis_name)
    before = lax.ppermute(segment_ids[:, -1], axis_name, [(i, i + 1) for i in range(size - 1)])
    # What comes before the first token is of its document.
    is_first = lax.axis_index(axis_name) == 0
    return ((before == segment_ids[:, 0]) | is_first).astype(jnp.float32)


def _varying(axis_name: str, x: Array) -> Array:
    known = axis_name in jax.typeof(x).manual_axis_type.varying
    return x if known else lax.pcast(x, (axis_name,), to="varying")


def spread_over_sequence(form: Callable, length: int) -> Callable:
    """The form on all devices of the mesh axis `sequence`, or as it is where that does not fit.

    Args:
      form: as of `pass_states`.
      length: T of all; split only if it divides.

    Returns:
      `(q, k, v, *gates, state, segment_ids, chunk_size)` as the form.
    """
    parts = axis_size("sequence")
    if parts == 1 or length % parts:
        return form

    def on_mesh(q, k, v, *rest):
        *gates, state, segment_ids, chunk_size = rest
        split, whole = PartitionSpec(None, "sequence"), PartitionSpec()

        def on_device(q, k, v, gates, state, segment_ids):
            call = partial(pass_states, form, "sequence", q, k, v, *gates, state)
            return call(segment_ids=segment_ids, chunk_size=chunk_size)

        return jax.shard_map(
            on_device,
            in_specs=(split, split, split, split, whole, split),
            out_specs=(split, whole),
            axis_names={"sequence"},
        )(q, k, v, gates, state, segment_ids)

    return on_mesh
