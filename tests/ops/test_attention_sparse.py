"""Sparse attention against the paper's sets, and torch attention under the same mask."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.attention_sparse import sparse_attention, sparse_mask

PATTERNS = {
    "local": {"window": 3},
    "strided": {"stride": 5},
    "fixed": {"stride": 5, "summary": 2},
    "dilated": {"stride": 3, "window": 2},
}
# Without the suite's shape checks, which would be first to refuse.
as_users_run_it = inspect.unwrap(sparse_attention)
sdpa = torch.nn.functional.scaled_dot_product_attention


def paper_set(pattern, t, length, causal):
    """The keys of query t, written as section 4.3 has them, for l = 5, c = 2."""
    if pattern == "local":
        keys = set(range(t - 3, t + 4))
    elif pattern == "strided":
        keys = set(range(t - 5, t + 6)) | {s for s in range(length) if (t - s) % 5 == 0}
    elif pattern == "fixed":
        keys = {s for s in range(length) if s // 5 == t // 5}
        keys |= {s for s in range(length) if s % 5 in (3, 4)}
    else:
        keys = {t + 3 * i for i in range(-2, 3)}
    return {s for s in keys if 0 <= s < length and (s <= t or not causal)}


def paper_mask(pattern, lengths, causal):
    """Documents of these lengths, one after the other."""
    total = sum(lengths)
    mask = np.zeros((total, total), bool)
    start = 0
    for length in lengths:
        for t in range(length):
            for s in paper_set(pattern, t, length, causal):
                mask[start + t, start + s] = True
        start += length
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_mask_is_the_set_of_the_paper(pattern, causal):
    places = jnp.arange(23)
    mask = sparse_mask(
        places[:, None],
        places[None, :],
        pattern=pattern,
        stride=PATTERNS[pattern].get("stride"),
        window=PATTERNS[pattern].get("window"),
        summary=PATTERNS[pattern].get("summary"),
        causal=causal,
    )
    np.testing.assert_array_equal(mask, paper_mask(pattern, [23], causal))


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def assert_matches_torch(pattern, lengths, causal, packed, **options):
    length = sum(lengths)
    q, k, v, weight = arrays(
        (2, length, 6, 5), (2, length, 2, 5), (2, length, 2, 7), (length, 6, 7)
    )
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    mask = torch.from_numpy(paper_mask(pattern, lengths, causal))
    out = sdpa(*(x.transpose(1, 2) for x in leaves), attn_mask=mask, enable_gqa=True, scale=0.3)
    out = out.transpose(1, 2)
    (out * torch.from_numpy(weight)[None]).sum().backward()

    ids = np.repeat([7, 3, 7, 9][: len(lengths)], lengths)
    ids = jnp.asarray(np.stack([ids, ids])) if packed else None

    def loss(q, k, v):
        out = sparse_attention(
            q, k, v, pattern=pattern, causal=causal, segment_ids=ids, scale=0.3, **options
        )
        return jnp.sum(weight[None] * out), out

    inputs = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    grads, found = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    for ours, theirs in zip(
        (found, *grads), (out.detach(), *(x.grad for x in leaves)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients_match_torch_under_the_mask(pattern, causal):
    assert_matches_torch(pattern, [23], causal, packed=False, **PATTERNS[pattern])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_match_torch_under_their_own_masks(pattern, causal):
    """Lengths such that blocks of documents lie across those of the sequence."""
    assert_matches_torch(pattern, [4, 13, 1, 11], causal, packed=True, **PATTERNS[pattern])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_form_and_a_single_token(pattern):
    assert_matches_torch(pattern, [7, 9], True, packed=True, form="dense", **PATTERNS[pattern])
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays((1, 2, 5), (1, 1, 5), (1, 1, 7)))
    out = sparse_attention(q, k, v, pattern=pattern, **PATTERNS[pattern])
    np.testing.assert_allclose(out, np.broadcast_to(v, (1, 2, 7)), rtol=1e-6)


def test_heads_one_after_the_other(monkeypatch):
    """What no memory is left for is done in a loop, with the same result."""
    from jaxmodels.ops import attention_sparse

    monkeypatch.setattr(attention_sparse, "_MAX_LOGITS", 1)
    assert_matches_torch("fixed", [4, 13], True, packed=True, **PATTERNS["fixed"])


def test_leading_dimensions_are_a_batch_and_vmap_agrees():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays(*[(2, 3, 11, 2, 5)] * 3))
    attend = jax.jit(lambda *x: sparse_attention(*x, pattern="strided", stride=4))
    out = attend(q, k, v)
    np.testing.assert_allclose(out[1, 2], attend(q[1, 2], k[1, 2], v[1, 2]), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(attend)(q, k, v), out, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"pattern": "strided", "stride": 64}, {"pattern": "fixed", "stride": 64, "summary": 1}],
)
def test_memory_is_far_below_all_pairs(options):
    """T (3 stride + T / stride) logits of several kinds, not T * T."""
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    grad = jax.grad(lambda *x: sparse_attention(*x, **options).sum(), (0, 1, 2))
    used = jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    assert used < 8 * 4 * length * (3 * 64 + length // 64)
    assert used < 4 * length * length


def test_half_precision_sums_in_float32():
    q, k = (jnp.zeros((1, 4099, 1, 3), jnp.bfloat16) for _ in range(2))
    v = jnp.ones((1, 4099, 1, 2), jnp.bfloat16)
    out = sparse_attention(q, k, v, pattern="local", window=2000)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "diagonal"}, "pattern='diagonal' is none of"),
        ({"pattern": "strided"}, "stride=None is missing for pattern='strided'"),
        ({"pattern": "local", "stride": 3, "window": 2}, "stride=3 is not used by"),
        ({"pattern": "local", "window": 0}, "window=0 must be at least 1"),
        ({"pattern": "fixed", "stride": 3, "summary": 4}, "summary=4 columns do not fit"),
        ({"pattern": "strided", "stride": 3, "form": "chunked"}, "form='chunked'"),
    ],
)
def test_bad_options_are_refused(options, message):
    x = jnp.zeros((1, 5, 2, 3))
    with pytest.raises(ValueError, match=message):
        sparse_attention(x, x, x, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 2, 3), (7, 2, 3), (7, 2, 3)), "with the same"),
        (((5, 2, 3), (5, 2, 4), (5, 2, 3)), "agree in heads"),
        (((5, 3, 3), (5, 2, 3), (5, 2, 3)), "3 query heads are no multiple of 2"),
    ],
)
def test_bad_shapes_are_refused(shapes, message):
    x = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        as_users_run_it(*x, pattern="strided", stride=3)


def test_segment_ids_of_another_shape_are_refused():
    x = jnp.zeros((1, 5, 2, 3))
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"segment_ids \(1, 4\) must be \(\*B, T\) = \(1, 5\)"):
        as_users_run_it(x, x, x, pattern="strided", stride=3, segment_ids=ids)
