"""Attention over a sequence that lies on many devices, none of which ever has it whole.

Keys and values travel round a ring of devices, and each device attends to what is
there with its own queries, keeping a running softmax. Backwards they travel round
once more, and their gradients with them, which are complete when home again.

A causal ring whose device i has the i-th part is idle for half of the time: the
first device sees its own part alone. So device i takes the i-th part and the i-th
last of twice as many instead, which gives every device the same work in every round.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmodels.ops import attention_blocked as blocked
from jaxmodels.ops.mesh_axes import vary_alike

# The log-sum-exp of no keys: finite, so that differences are numbers.
_NOTHING = -1e30


class _Ring(NamedTuple):
    """What is fixed at trace time."""

    axis: str
    causal: bool
    scale: float
    softcap: float | None


def ring_attention(
    q: Float[Array, "N T H K"],
    k: Float[Array, "N T G K"],
    v: Float[Array, "N T G V"],
    *,
    axis_name: str = "sequence",
    causal: bool = False,
    segment_ids: Int[Array, "N T"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "N T H V"]:
    """Softmax attention inside a `shard_map` that splits the sequence over an axis.

    out_t = sum over devices j of exp(L_tj - L_t) out_tj,   L_t = log sum_j exp(L_tj)

    with out_tj the attention to the keys of device j and L_tj the logarithm of the
    sum of their exponentials, in float32 or wider. P devices send keys and values on
    P times, which is as much as all of them together have, and backwards that and its
    gradients; memory is that of a device's own part. The next part is sent while this
    one is attended to. If causal, parts are exchanged before and after so that all
    devices have equal work, where their length is even.

    Args:
      q, k, v: the device's part of queries, keys and values; parts lie in the order
        of the devices and are equally long. G divides H.
      axis_name: of the mesh axis that the sequence is split over.
      causal, scale, softcap, sinks: as in `ops.dot_product_attention`.
      segment_ids: of the device's part; only equal ids see each other, wherever they are.

    Returns:
      The mixed values of the device's queries, in v's dtype.

    Raises:
      ValueError: shapes disagree.

    Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers",
    section 3 (arXiv:2310.01889); the exchange for causal masks from Brandon et al.
    2023, "Striped Attention" (arXiv:2311.09431), in halves instead of stripes.
    """
    _check(q, k, v, segment_ids, sinks)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    ring = _Ring(axis_name, causal, scale, softcap)
    exchanged = causal and q.shape[1] % 2 == 0
    if exchanged:
        q, k, v, segment_ids = (_balanced(axis_name, x) for x in (q, k, v, segment_ids))
    groups = k.shape[2]
    heads_first = [_split_heads(x, groups) for x in (q, k, v)]
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.reshape(1, groups, -1), heads_first[0].shape[:3])
    out = _ring(ring, *vary_alike((*heads_first, sinks, segment_ids)))
    out = out.transpose(0, 3, 1, 2, 4).reshape(*q.shape[:3], -1).astype(v.dtype)
    return _unbalanced(axis_name, out) if exchanged else out


def _check(q, k, v, segment_ids, sinks):
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"ring_attention: q {q.shape}, k {k.shape} and v {v.shape} must be (N, T, H, K), "
            f"(N, T, G, K) and (N, T, G, V) with the same N and T, and G must divide H"
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(
            f"ring_attention: segment_ids {segment_ids.shape} must be (N, T) = {q.shape[:2]}"
        )
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"ring_attention: sinks {sinks.shape} must be (H,) = {q.shape[2:3]}")


def _split_heads(x, groups):
    """(N, T, H, K) to (N, G, H / G, T, K)."""
    return x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring, q, k, v, sinks, ids):
    return _forward(ring, q, k, v, sinks, ids)[0]


def _forward(ring, q, k, v, sinks, ids):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros_like(q, wide, shape=(*q.shape[:-1], v.shape[-1]))
    total = jnp.full_like(out[..., 0], _NOTHING)
    # As a sink that weighs nothing, it makes rows without keys known by their sum.
    empty = jnp.full_like(total[..., 0], _NOTHING)

    def attend(config, queries, keys, round_, state):
        k, v, key_ids = round_
        rows, columns = (slice(*x) for x in (queries, keys))
        pairs = _pairs(ids, key_ids, rows, columns)
        part, (*_, part_total) = blocked.forward(
            config,
            q[..., rows, :],
            k[..., columns, :],
            v[..., columns, :].astype(wide),
            empty,
            pairs,
        )
        out, total = state
        merged = _merge((out[..., rows, :], total[..., rows]), (part, part_total))
        return _put(out, merged[0], rows.start), _put(total, merged[1], rows.start)

    (out, total), _ = _go_round(ring, attend, (out, total), (k, v, ids), ())
    if sinks is not None:
        with_sink = jnp.logaddexp(total, sinks.astype(wide)[..., None])
        out, total = out * jnp.exp(total - with_sink)[..., None], with_sink
    # Rows that see nothing are zeros, and their gradients are so with any finite sum.
    total = jnp.where(total < 0.5 * _NOTHING, 0.0, total)
    return out, (q, k, v, sinks, ids, out, total)


def _put(x, part, start):
    """Writes part of the time axis, the fourth."""
    return lax.dynamic_update_slice_in_dim(x, part, start, axis=3)


def _merge(first, second):
    """Two softmaxes over different keys, as one over all of them."""
    (out, total), (part, part_total) = first, second
    joined = jnp.logaddexp(total, part_total)
    kept, added = (jnp.exp(x - joined)[..., None] for x in (total, part_total))
    return kept * out + added * part, joined


def _backward(ring, saved, d_out):
    q, k, v, sinks, ids, out, total = saved
    wide = total.dtype
    q_wide, d_out = q.astype(wide), d_out.astype(wide)

    def attend(config, queries, keys, round_, state):
        d_q, d_k, d_v = state
        k, v, key_ids = round_
        rows, columns = (slice(*x) for x in (queries, keys))
        at_rows = (x[..., rows, :] for x in (q_wide, out, d_out))
        some_q, some_out, some_d_out = at_rows
        some_k, some_v = (x[..., columns, :].astype(wide) for x in (k, v))
        pairs = _pairs(ids, key_ids, rows, columns)
        kept = (some_q, some_k, some_v, None, pairs, some_out, total[..., rows])
        more_q, more_k, more_v, *_ = blocked.backward(config, kept, some_d_out)
        return (
            _put(d_q, d_q[..., rows, :] + more_q, rows.start),
            _put(d_k, d_k[..., columns, :] + more_k, columns.start),
            _put(d_v, d_v[..., columns, :] + more_v, columns.start),
        )

    travelling = (jnp.zeros_like(k, wide), jnp.zeros_like(v, wide))
    (d_q,), (d_k, d_v) = _go_round(ring, attend, (jnp.zeros_like(q_wide),), (k, v, ids), travelling)
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(wide)[..., None] - total)
        d_sinks = -jnp.sum(share * jnp.sum(d_out * out, axis=-1), axis=-1).astype(sinks.dtype)
    return *(g.astype(x.dtype) for g, x in ((d_q, q), (d_k, k), (d_v, v))), d_sinks, None


_ring.defvjp(_forward, _backward)


def _go_round(ring, attend, staying, round_, travelling):
    """Every device's keys past every device's queries, and home.

    Args:
      ring: what is fixed.
      attend: `(config, queries, keys, round_, state) -> state` for a range of the
        device's queries and a range of the keys that are there.
      staying: the part of the state that belongs to the queries.
      round_: keys, values and their segment ids, which go round.
      travelling: the part of the state that goes with them.

    Returns:
      Both parts of the state.
    """
    size, here = lax.axis_size(ring.axis), lax.axis_index(ring.axis)
    length = round_[0].shape[-2]
    # What an earlier device's keys, and a later one's, have to do with this one's queries.
    seen, seeing = (length // 2, length // 2) if length % 2 == 0 else (length, length)
    everything, own = (
        blocked.Config((None, right), ring.scale, ring.softcap, 0) for right in (None, 0)
    )
    whole = (0, length)
    branches = [
        lambda round_, state: attend(own, whole, whole, round_, state),
        lambda round_, state: attend(everything, whole, (0, seen), round_, state),
        lambda round_, state: (
            attend(everything, (seeing, length), whole, round_, state) if seeing < length else state
        ),
    ]
    onwards = [(i, (i + 1) % size) for i in range(size)]

    def one(carry, step):
        staying, round_, travelling = carry
        state = (*staying, *travelling)
        if ring.causal:
            source = (here - step) % size
            which = jnp.where(source == here, 0, jnp.where(source < here, 1, 2))
            state = lax.switch(which, branches, round_, state)
        else:
            state = attend(everything, whole, whole, round_, state)
        staying, travelling = state[: len(staying)], state[len(staying) :]
        # Needs nothing of this round but the gradients, so it can be under way meanwhile.
        round_, travelling = jax.tree.map(
            lambda x: lax.ppermute(x, ring.axis, onwards), (round_, travelling)
        )
        return (staying, round_, travelling), None

    (staying, _, travelling), _ = lax.scan(one, (staying, round_, travelling), jnp.arange(size))
    return staying, travelling


def _pairs(ids, key_ids, rows, columns):
    segment_ids = None if ids is None else (ids[:, rows], key_ids[:, columns])
    return blocked.Pairs(None, None, segment_ids)


def _homes(axis):
    """Where the first and the second half of each device's part go, as pairs for `ppermute`."""
    size = lax.axis_size(axis)

    def home(part):
        return min(part, 2 * size - 1 - part)

    return [[(i, home(2 * i + half)) for i in range(size)] for half in (0, 1)]


def _balanced(axis, x):
    """From two neighbouring parts a device to the i-th and the i-th last."""
    if x is None:
        return None
    halves = jnp.split(x, 2, axis=1)
    even, odd = (
        lax.ppermute(part, axis, pairs) for part, pairs in zip(halves, _homes(axis), strict=True)
    )
    return jnp.concatenate(_swapped_if_odd(axis, even, odd), axis=1)


def _unbalanced(axis, x):
    """Undoes `_balanced`."""
    parts = _swapped_if_odd(axis, *jnp.split(x, 2, axis=1))
    back = [[(target, source) for source, target in pairs] for pairs in _homes(axis)]
    return jnp.concatenate(
        [lax.ppermute(part, axis, pairs) for part, pairs in zip(parts, back, strict=True)], axis=1
    )


def _swapped_if_odd(axis, first, second):
    """An odd device has an odd part first."""
    is_odd = lax.axis_index(axis) % 2 == 1
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)
