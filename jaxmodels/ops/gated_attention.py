"""The attention of the gated attention unit: one head, squared ReLU or softmax weights."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.ops.attention import dot_product_attention
from jaxmodels.ops.segments import document_index, document_positions

# Weights of a block of queries, in memory at once, and queries in it at the least.
_MAX_WEIGHTS, _MIN_ROWS = 1 << 22, 64
# Blocks written out one after the other, each with its own range of keys; beyond
# this many, neighbours share a range and a loop, which bounds the compile time.
_MAX_SPANS = 8


def gated_attention(
    q: Float[Array, "*B T K"],
    k: Float[Array, "*B S K"],
    v: Float[Array, "*B S E"],
    *,
    kernel: str = "relu2",
    causal: bool = False,
    segment_ids: Int[Array, "*B T"] | None = None,
    mask: Bool[Array, "*B T S"] | None = None,
    bias: tuple[Float[Array, "*B T R"], Float[Array, "*B S R"]] | None = None,
    form: str = "blocked",
) -> Float[Array, "*B T E"]:
    """Mixes values by squared ReLU weights (or softmax ones), with a single head.

    relu2    out_t = sum_s relu(q_t . k_s / n_t + a_t . b_s)^2 v_s
    softmax  out_t = sum_s softmax_s(q_t . k_s / sqrt(K) + a_t . b_s) v_s

    over the keys s that query t sees, n_t in number. A query without keys gives 0.

    Time is O(T S). Memory is O(T + S): blocks of queries are done one after the
    other, skip what causality hides, and are recomputed in the backward pass.

    Args:
      q, k, v: queries, keys and values.
      kernel: "relu2" is the paper's; "softmax" that of its ablation.
      causal: hides later keys; S must be T.
      segment_ids: of the documents, which do not see each other; S must be T.
      mask: which keys each query sees, instead of causal and segment_ids.
      bias: factors (a, b) of a bias on the logits. Vectors turned by the position
        give the relative bias of the paper.
      form: "blocked"; "parallel" is the definition, with all T S weights in memory.

    Returns:
      The mixed values, in v's dtype; sums are in float32 or wider.

    Raises:
      ValueError: shapes disagree, an unknown kernel or form, or a mask together
        with causal or segment_ids.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", section 2.2 and
    its pseudocode (arXiv:2202.10447). Deviation: there n is the length of
    the sequence. With n_t, which is t + 1 in a causal document, what follows a
    token does not change its output; so do Ma et al. 2022, "Mega" (arXiv:2209.10655).
    """
    _check(q, k, v, kernel, causal, segment_ids, mask, bias, form)
    lead, (length, width), num_keys = q.shape[:-2], q.shape[-2:], k.shape[-2]
    batch = math.prod(lead)
    documents = None
    if segment_ids is not None:
        documents = document_index(segment_ids.reshape(batch, length))
    if mask is not None:
        mask = mask.reshape(batch, length, num_keys)
    if kernel == "relu2":
        seen = _number_seen(documents, mask, causal, length, num_keys)
        scale = 1.0 / jnp.maximum(seen, 1).astype(jnp.float32)[..., None]
    else:
        scale = jnp.float32(1.0 / math.sqrt(width))[None, None, None]
    q, k, v = (x.reshape(batch, *x.shape[-2:]) for x in (q, k, v))
    # In q's dtype, or 1 / n_t would make half precision single.
    q = (q * scale).astype(q.dtype)
    if bias is not None:
        a, b = (x.reshape(batch, *x.shape[-2:]) for x in bias)
        q, k = (jnp.concatenate([x, y.astype(x.dtype)], -1) for x, y in ((q, a), (k, b)))
    if kernel == "softmax":
        out = _softmax_attention(q, k, v, documents, mask, causal, form)
    elif form == "parallel":
        out = _squared_relu(q, k, v, documents, mask, documents, 0, causal=causal)
    else:
        out = _blocked_squared_relu(q, k, v, documents, mask, causal)
    return out.reshape(*lead, *out.shape[1:])


def _check(q, k, v, kernel, causal, segment_ids, mask, bias, form):
    def fail(message):
        raise ValueError(f"gated_attention: {message}")

    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim < 2 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        fail(f"q, k and v must be (*B, T, width) with the same leading dimensions, not {shapes}")
    if k.shape[-2] != v.shape[-2] or q.shape[-1] != k.shape[-1] or 0 in q.shape + v.shape:
        fail(f"k and v must agree in length, q and k in width, and none be empty: {shapes}")
    if kernel not in ("relu2", "softmax"):
        fail(f'kernel={kernel!r} is neither "relu2" nor "softmax"')
    if form not in ("blocked", "parallel"):
        fail(f'form={form!r} is neither "blocked" nor "parallel"')
    if mask is not None and (causal or segment_ids is not None):
        fail(f"mask stands instead of causal={causal} and segment_ids; combine them into mask")
    if mask is None and (causal or segment_ids is not None) and q.shape[-2] != k.shape[-2]:
        fail(f"causal and segment_ids need as many queries as keys, not {shapes}; pass a mask")
    if mask is not None and mask.shape != (*q.shape[:-1], k.shape[-2]):
        fail(f"mask {mask.shape} must be (*B, T, S) = {(*q.shape[:-1], k.shape[-2])}")
    if segment_ids is not None and segment_ids.shape != q.shape[:-1]:
        fail(f"segment_ids {segment_ids.shape} must be (*B, T) = {q.shape[:-1]}")
    if bias is not None:
        a, b = bias
        if (
            a.shape[:-1] != q.shape[:-1]
            or b.shape[:-1] != k.shape[:-1]
            or a.shape[-1] != b.shape[-1]
        ):
            fail(f"bias {a.shape} and {b.shape} must be (*B, T, R) and (*B, S, R): {shapes}")


def keys_seen(documents: Int[Array, "B T"], causal: bool) -> Int[Array, "B T"]:
    """How many keys each query sees: those of its document, not the later ones if causal.

    Args:
      documents: from `document_index`.
      causal: hides later keys.
    """
    before = document_positions(documents) + 1
    if causal:
        return before
    backwards = document_positions(documents[:, ::-1])[:, ::-1]
    return before + backwards


def _number_seen(documents, mask, causal, length, num_keys):
    if mask is not None:
        return mask.sum(-1)
    if documents is not None:
        return keys_seen(documents, causal)
    if causal:
        return jnp.arange(1, length + 1)[None]
    return jnp.full((1, length), num_keys)


def _softmax_attention(q, k, v, documents, mask, causal, form):
    out = dot_product_attention(
        *(x[:, :, None] for x in (q, k, v)),
        scale=1.0,
        causal=causal,
        segment_ids=documents,
        mask=None if mask is None else mask[:, None],
        implementation="auto" if form == "blocked" else "naive",
    )
    return out[:, :, 0]


def _squared_relu(q, k, v, own, mask, documents, start, *, causal):
    """The definition for queries that stand at `start` and after it."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("btk,bsk->bts", q, k, preferred_element_type=wide)
    if own is not None:
        same = own[:, :, None] == documents[:, None, : k.shape[1]]
        mask = same if mask is None else mask & same
    if causal:
        earlier = start + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])[None, :]
        mask = earlier[None] if mask is None else mask & earlier[None]
    if mask is not None:
        logits = jnp.where(mask, logits, 0.0)
    weights = jnp.square(jax.nn.relu(logits)).astype(v.dtype)
    return jnp.einsum("bts,bse->bte", weights, v, preferred_element_type=wide).astype(v.dtype)


def _blocked_squared_relu(q, k, v, documents, mask, causal):
    batch, length, _ = q.shape
    rows = min(length, max(_MIN_ROWS, _MAX_WEIGHTS // (batch * k.shape[1])))
    count = -(-length // rows)
    per_span = -(-count // _MAX_SPANS)
    attend = jax.checkpoint(partial(_squared_relu, causal=causal))
    q, own, mask = (_pad_time(x, count * rows) for x in (q, documents, mask))
    outs = []
    for first in range(0, count, per_span):
        starts = rows * jnp.arange(first, min(first + per_span, count))
        keys = (k, v) if not causal else (x[:, : rows * (first + per_span)] for x in (k, v))
        block = partial(_block, attend, q, *keys, own, mask, documents, rows)
        # A loop of one step would hide from XLA where the block starts.
        out = lax.map(block, starts) if len(starts) > 1 else block(rows * first)[None]
        outs.append(out.swapaxes(0, 1).reshape(batch, -1, v.shape[-1]))
    return jnp.concatenate(outs, 1)[:, :length]


def _pad_time(x, length):
    if x is None:
        return None
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _block(attend, q, k, v, own, mask, documents, rows, start):
    q, own, mask = (
        None if x is None else lax.dynamic_slice_in_dim(x, start, rows, axis=1)
        for x in (q, own, mask)
    )
    return attend(q, k, v, own, mask, documents, start)
