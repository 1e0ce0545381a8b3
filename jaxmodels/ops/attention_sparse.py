"""Attention to a fixed pattern of keys, block by block.

Every pattern is a few near keys, which lie in the query's own block of the
sequence and its neighbours, and perhaps some far ones. Both kinds of logits come
from batched products of small blocks, and one softmax runs over both: they share
a maximum and a sum, and never meet in one array.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmodels.ops.attention import dot_product_attention
from jaxmodels.ops.batched_product import batched_product
from jaxmodels.ops.segments import document_index, document_positions

_OPTIONS = {
    "local": ("window",),
    "strided": ("stride",),
    "fixed": ("stride", "summary"),
    "dilated": ("stride", "window"),
}
# A short window still gets products of a decent size.
_MIN_BLOCK = 64
# In memory at once, 64 MB of each array of their size.
_MAX_LOGITS = 1 << 24


def sparse_mask(
    queries: Int[Array, "..."],
    keys: Int[Array, "..."],
    *,
    pattern: str,
    stride: int | None = None,
    window: int | None = None,
    summary: int | None = None,
    causal: bool = True,
) -> Bool[Array, "..."]:
    """Whether a query at place t sees a key at place s.

    local    |t - s| <= window
    strided  |t - s| <= stride  or  t - s a multiple of stride
    fixed    floor(t / stride) = floor(s / stride)  or  s mod stride >= stride - summary
    dilated  |t - s| <= window stride  and  t - s a multiple of stride

    and s <= t if causal.

    Args:
      queries, keys: places in the document, of shapes that broadcast to each other.
      pattern, stride, window, summary, causal: as in `sparse_attention`.

    Returns:
      One truth value for each pair of the broadcast shape.

    Raises:
      ValueError: as `sparse_attention`, of the pattern and its options.

    Source: Child et al. 2019, section 4.3 (arXiv:1904.10509).
    """
    check_pattern("sparse_mask", pattern, stride, window, summary)
    distance = queries - keys
    if pattern == "local":
        seen = abs(distance) <= window
    elif pattern == "strided":
        seen = (abs(distance) <= stride) | (distance % stride == 0)
    elif pattern == "fixed":
        seen = (queries // stride == keys // stride) | (keys % stride >= stride - summary)
    else:
        seen = (abs(distance) <= window * stride) & (distance % stride == 0)
    return seen & (distance >= 0) if causal else seen


def sparse_attention(
    q: Float[Array, "*B T H K"],
    k: Float[Array, "*B T G K"],
    v: Float[Array, "*B T G V"],
    *,
    pattern: str,
    stride: int | None = None,
    window: int | None = None,
    summary: int | None = None,
    causal: bool = True,
    segment_ids: Int[Array, "*B T"] | None = None,
    scale: float | None = None,
    form: str = "blocked",
) -> Float[Array, "*B T H V"]:
    """Softmax attention to the keys that a pattern lets each query see.

    out_t = sum_s softmax_s(scale q_t . k_s) v_s,   s where sparse_mask(t, s)

    "strided" is the union of the two strided heads of the paper and "fixed" that
    of its two fixed heads, with one softmax: its "merged" head.

    A query is compared with 2 blocks of keys (3 if not causal) and with T / stride
    ("strided") or T summary / stride ("fixed") far ones. Time and memory are O(T
    window) for "local" and "dilated", O(T (stride + T / stride)) for "strided", and
    O(T (stride + T summary / stride)) for "fixed"; the probabilities are recomputed
    in the backward pass. Any T will do.

    Args:
      q, k, v: queries, keys and values; G divides H.
      pattern: "local", "strided", "fixed" or "dilated", see `sparse_mask`.
      stride: l of the paper, about sqrt(T); for "dilated" the step between keys.
        Not of "local".
      window: keys on each side, for "local" and "dilated" alone.
      summary: c of the paper, how many keys at the end of each block of `stride`
        are seen from everywhere, for "fixed" alone.
      causal: hides later keys.
      segment_ids: of the documents; places, and with them blocks, count from the
        beginning of each.
      scale: factor on q . k; None is 1 / sqrt(K).
      form: "blocked"; "dense" is the definition, with all T * T logits.

    Returns:
      The mixed values, in v's dtype.

    Raises:
      ValueError: shapes disagree, the pattern or the form is unknown, or an option
        is missing, does not belong to the pattern or is out of range.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
    sections 4.3 and 5.2 (arXiv:1904.10509), where all patterns are causal; dilation
    from Beltagy et al. 2020, "Longformer", section 3.1 (arXiv:2004.05150).
    """
    check_pattern("sparse_attention", pattern, stride, window, summary)
    _check_shapes(q, k, v, segment_ids)
    if form not in ("blocked", "dense"):
        _fail(f'form={form!r} is neither "blocked" nor "dense"')
    lead, length = q.shape[:-3], q.shape[-3]
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (scale * q, k, v))
    ids = jnp.zeros((1, length), jnp.int32) if segment_ids is None else segment_ids
    ids = ids.reshape(-1, length)
    documents, places = document_index(ids), document_positions(ids)
    options = {"stride": stride, "window": window, "summary": summary}
    if form == "dense":
        pairs = places[:, :, None], places[:, None, :]
        seen = sparse_mask(*pairs, pattern=pattern, causal=causal, **options)
        seen = (seen & (documents[:, :, None] == documents[:, None, :]))[:, None]
        out = dot_product_attention(q, k, v, mask=seen, scale=1.0, implementation="naive")
    else:
        aligned = segment_ids is None
        attend = {
            "local": partial(_local, window=window),
            "strided": partial(_strided, stride=stride),
            "fixed": partial(_fixed, stride=stride, summary=summary, aligned=aligned),
            "dilated": partial(_dilated, stride=stride, window=window),
        }[pattern]
        logits = _logits_per_head(length, q.shape[2] // k.shape[2], **options)
        out = _some_heads_at_a_time(
            partial(attend, causal=causal), q, k, v, documents, places, logits
        )
    return out.reshape(*lead, *out.shape[1:])


def check_pattern(
    name: str, pattern: str, stride: int | None, window: int | None, summary: int | None
) -> None:
    """Raises unless the options are those of the pattern.

    Raises:
      ValueError: naming the function, the pattern, the option and the remedy.
    """
    if pattern not in _OPTIONS:
        raise ValueError(f"{name}: pattern={pattern!r} is none of {sorted(_OPTIONS)}")
    needed = _OPTIONS[pattern]
    for option, value in {"stride": stride, "window": window, "summary": summary}.items():
        if (value is not None) != (option in needed):
            problem = "is not used by" if value is not None else "is missing for"
            raise ValueError(
                f"{name}: {option}={value} {problem} pattern={pattern!r}, which takes "
                f"{' and '.join(needed)} alone"
            )
        if value is not None and value < 1:
            raise ValueError(f"{name}: {option}={value} must be at least 1")
    if pattern == "fixed" and summary > stride:
        raise ValueError(
            f"{name}: summary={summary} columns do not fit a block of stride={stride}; "
            f"take at most {stride}"
        )


def _fail(message: str):
    raise ValueError(f"sparse_attention: {message}")


def _check_shapes(q, k, v, segment_ids):
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim < 3 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        _fail(f"q, k and v must be (*B, T, heads, width) with the same *B and T, not {shapes}")
    if k.shape[-2] != v.shape[-2] or q.shape[-1] != k.shape[-1] or 0 in q.shape + v.shape:
        _fail(f"k and v must agree in heads, q and k in width, and none be empty: {shapes}")
    if q.shape[-2] % k.shape[-2]:
        _fail(
            f"{q.shape[-2]} query heads are no multiple of {k.shape[-2]} key/value heads; "
            f"choose a number of key/value heads that divides the query heads"
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:-2]:
        _fail(f"segment_ids {segment_ids.shape} must be (*B, T) = {q.shape[:-2]}")


def _logits_per_head(length, group, stride, window, summary):
    """About how many logits the query heads of one key/value head have."""
    near = 3 * max(stride or 0, window or 0, _MIN_BLOCK)
    far = length * (summary or 1) // stride if stride else 0
    return group * length * (near + far)


def _some_heads_at_a_time(attend, q, k, v, documents, places, logits):
    """Calls `attend` for each key/value head, as many at once as memory allows."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    count = batch * kv_heads
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, -1).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    documents, places = (
        jnp.broadcast_to(x[:, None], (batch, kv_heads, length)) for x in (documents, places)
    )
    fitting = [n for n in range(1, count + 1) if count % n == 0 and n * logits <= _MAX_LOGITS]
    at_once = max(fitting, default=1)
    several = jax.checkpoint(jax.vmap(attend))
    arrays = [x.reshape(-1, at_once, *x.shape[2:]) for x in (q, k, v, documents, places)]
    if at_once == count:
        out = several(*(x[0] for x in arrays))
    else:
        out = lax.map(lambda x: several(*x), tuple(arrays))
    return out.reshape(batch, heads, length, -1).transpose(0, 2, 1, 3)


# What follows is for one key/value head: its queries q (h, T, K), keys k (T, K), values
# v (T, V) and the documents and places (T,) of the tokens. Blocks are N blocks of C
# queries, (N, h, C, K), each of which meets S keys, (N, S, K), and the ids of those
# tokens, (N, C) and (N, S). Nothing real has id -1.


def _local(q, k, v, documents, places, *, window, causal):
    del places
    size = max(window, min(_MIN_BLOCK, len(k)))
    q, k, v, ids = _blocks(q, k, v, documents, size)
    near = _near(q, k, v, ids, 1, causal, most=window)
    return _joined(_softmax_over(near), len(documents))


def _strided(q, k, v, documents, places, *, stride, causal):
    del places
    q, k, v, ids = _blocks(q, k, v, documents, stride)
    near = _near(q, k, v, ids, 1, causal, most=stride)
    # The blocks are the rows of a table. The keys at multiples of the stride are
    # those of the query's column, and those one row away are near keys already.
    rows = jnp.arange(len(k))
    apart = rows[:, None] - rows[None, :]
    new = apart > 1 if causal else abs(apart) > 1
    seen = new[None] & (ids.T[:, :, None] == ids.T[:, None, :])
    far = _logits(q.swapaxes(0, 2), k.swapaxes(0, 1), seen), v.swapaxes(0, 1)
    return _joined(_softmax_over(near, far, lambda x: x.swapaxes(0, 2)), len(documents))


def _fixed(q, k, v, documents, places, *, stride, summary, aligned, causal):
    # The blocks of a document need not begin where those of the sequence do; then
    # each lies in two of the latter.
    owners = jnp.cumsum(places % stride == 0, dtype=jnp.int32)
    # No more summary keys than this: between those of two blocks of documents lie
    # stride - summary others, so `stride` successive tokens hold `summary` at the most.
    most = min(len(k), summary * -(-len(k) // stride))
    far = jnp.flatnonzero(places % stride >= stride - summary, size=most, fill_value=-1)
    far_documents = jnp.where(far < 0, -1, documents[far])
    far_keys, far_values, far_owners = k[far], v[far], owners[far]

    q, k, v, ids = _blocks(q, k, v, owners, stride)
    near = _near(q, k, v, ids, 0 if aligned else 1, causal, most=stride)
    apart = ids[:, :, None] - far_owners[None, None]
    own = jnp.pad(documents, (0, ids.size - len(documents)), constant_values=-2).reshape(ids.shape)
    seen = (apart > 0 if causal else apart != 0) & (own[:, :, None] == far_documents[None, None])
    far = _logits(q, far_keys[None], seen), far_values[None]
    return _joined(_softmax_over(near, far), len(documents))


def _dilated(q, k, v, documents, places, *, stride, window, causal):
    length, padding = len(k), -len(k) % stride

    def columns(x):
        """Every stride-th token as a sequence of its own; time is the last but one axis."""
        return x.reshape(*x.shape[:-2], -1, stride, x.shape[-1]).swapaxes(-3, -2)

    q = columns(jnp.pad(q, ((0, 0), (0, padding), (0, 0)))).swapaxes(0, 1)
    k, v = (columns(jnp.pad(x, ((0, padding), (0, 0)))) for x in (k, v))
    documents = jnp.pad(documents, (0, padding), constant_values=-1).reshape(-1, stride).T
    attend = jax.vmap(partial(_local, places=None, window=window, causal=causal))
    out = attend(q, k, v, documents)
    return out.transpose(1, 2, 0, 3).reshape(out.shape[1], -1, out.shape[3])[:, :length]


def _blocks(q, k, v, ids, size):
    padding = -len(k) % size
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0)))
    q = q.reshape(len(q), -1, size, q.shape[-1]).swapaxes(0, 1)
    k, v = (jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, size, x.shape[-1]) for x in (k, v))
    return q, k, v, jnp.pad(ids, (0, padding), constant_values=-1).reshape(-1, size)


def _joined(x, length):
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])[:, :length]


def _near(q, k, v, ids, reach, causal, most):
    """Logits and values of keys of equal id at most `most` away, within `reach` blocks."""
    size = k.shape[1]
    sides = (reach, 0 if causal else reach)
    queries = reach * size + jnp.arange(size)
    distance = queries[:, None] - jnp.arange((1 + sum(sides)) * size)[None, :]
    seen = ((distance >= 0) if causal else (distance >= -most)) & (distance <= most)
    beside = with_neighbours(ids, sides, -1)
    seen = seen[None] & (ids[:, :, None] == beside[:, None, :])
    return _logits(q, with_neighbours(k, sides, 0), seen), with_neighbours(v, sides, 0)


def with_neighbours(
    x: Shaped[Array, "N C ..."], sides: tuple[int, int], fill: int
) -> Shaped[Array, "N S ..."]:
    """Joins each block to as many before and after it as `sides` says.

    Args:
      x: blocks of C steps each.
      sides: how many blocks before and after.
      fill: what lies beyond the first and the last block.
    """
    padded = jnp.pad(x, (sides, *[(0, 0)] * (x.ndim - 1)), constant_values=fill)
    return jnp.concatenate([padded[i : i + len(x)] for i in range(1 + sum(sides))], axis=1)


def _logits(q, k, seen):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    rows = q.reshape(len(k), -1, q.shape[-1])
    logits = batched_product(rows, k.swapaxes(1, 2), preferred_element_type=wide)
    return jnp.where(seen[:, None], logits.reshape(*q.shape[:-1], -1), -jnp.inf)


def _softmax_over(near, far=None, turn=lambda x: x):
    """Values weighted by one softmax over near and far logits.

    Args:
      near, far: logits and values, each in its own arrangement of the queries.
      turn: takes the arrangement of near to that of far and back.
    """
    top = near[0].max(-1)
    if far is not None:
        top = jnp.maximum(top, turn(far[0].max(-1)))
    top = lax.stop_gradient(top)
    total, out = _weighted(*near, top)
    if far is not None:
        far_total, far_out = _weighted(*far, turn(top))
        total, out = total + turn(far_total), out + turn(far_out)
    return (out / total[..., None]).astype(near[1].dtype)


def _weighted(logits, values, top):
    weights = jnp.exp(logits - top[..., None])
    rows = weights.astype(values.dtype).reshape(len(values), -1, weights.shape[-1])
    out = batched_product(rows, values, preferred_element_type=weights.dtype)
    return weights.sum(-1), out.reshape(*weights.shape[:-1], -1)
