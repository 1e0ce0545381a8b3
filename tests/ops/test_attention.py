"""Values and gradients against torch and against models in transformers."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from transformers.masking_utils import sliding_window_overlay
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from jaxmodels.ops import attention_blocked, attention_spans, dot_product_attention

sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(params=["naive", "blocked", "short"])
def implementation(request):
    return request.param


@pytest.fixture(params=["naive", "blocked", "small blocks", "short"])
def any_blocks(request, monkeypatch):
    """Small blocks: many spans, loops inside spans, and a ragged last block."""
    if request.param != "small blocks":
        return request.param
    for name in ("_FORWARD_LOGITS", "_BACKWARD_LOGITS"):
        monkeypatch.setattr(attention_blocked, name, 1)
    for name, value in {"MAX_LOGITS": 1, "MIN_ROWS": 3, "MAX_SPANS": 2}.items():
        monkeypatch.setattr(attention_spans, name, value)
    return "blocked"


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def qkv(batch=3, queries=13, keys=13, heads=6, kv_heads=2, width=5, value_width=7):
    return arrays(
        (batch, queries, heads, width),
        (batch, keys, kv_heads, width),
        (batch, keys, kv_heads, value_width),
    )


def ours(inputs, weight, implementation, **options):
    """Output and gradients of sum(weight * output) for each of the named inputs."""

    def loss(inputs):
        qkv = [inputs[name] for name in "qkv"]
        rest = {name: x for name, x in inputs.items() if name not in "qkv"}
        out = dot_product_attention(*qkv, **rest, **options, implementation=implementation)
        return jnp.sum(weight * out), out

    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    return {"out": out, **gradients}


def theirs(attend, inputs, weight):
    """The same for torch in float64, with heads before time as torch has them."""
    leaves = {name: torch.tensor(x, dtype=torch.float64) for name, x in inputs.items()}
    for x in leaves.values():
        x.requires_grad_()
    heads_first = {name: x.transpose(1, 2) if name in "qkv" else x for name, x in leaves.items()}
    out = attend(**heads_first).transpose(1, 2)
    (out * torch.from_numpy(weight)).sum().backward()
    return {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}


def assert_close(actual, expected, tolerance=1e-5):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance * max(1.0, abs(value).max()),
            err_msg=name,
        )


def compare(attend, implementation, inputs, **options):
    q, _, v = (inputs[name] for name in "qkv")
    (weight,) = arrays((*q.shape[:-1], v.shape[-1]), seed=1)
    assert_close(ours(inputs, weight, implementation, **options), theirs(attend, inputs, weight))


def named(q, k, v, **rest):
    return {"q": q, "k": k, "v": v, **rest}


@pytest.mark.parametrize("kv_heads", [1, 6])
def test_grouped_heads_match_torch(implementation, kv_heads):
    inputs = named(*qkv(keys=17, kv_heads=kv_heads))
    compare(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), implementation, inputs)


def test_one_query_and_one_key(implementation):
    inputs = named(*qkv(queries=1, keys=1))
    compare(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), implementation, inputs)


def test_scale_matches_torch(implementation):
    inputs = named(*qkv())
    compare(
        lambda q, k, v: sdpa(q, k, v, scale=0.3, enable_gqa=True), implementation, inputs, scale=0.3
    )


@pytest.mark.parametrize("queries, keys", [(13, 13), (7, 19)])
def test_causal_aligns_the_last_query_with_the_last_key(any_blocks, queries, keys):
    inputs = named(*qkv(queries=queries, keys=keys))
    seen = causal_lower_right(queries, keys)._materialize()
    compare(
        lambda q, k, v: sdpa(q, k, v, attn_mask=seen, enable_gqa=True),
        any_blocks,
        inputs,
        causal=True,
    )


def test_causal_over_several_full_size_blocks(implementation):
    inputs = named(*qkv(batch=1, queries=521, keys=521, heads=2, kv_heads=1))
    compare(
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        implementation,
        inputs,
        causal=True,
    )


@pytest.mark.parametrize(
    "full, kv_heads", [((1, 0, 0, 1), 2), ((0, 1, 1, 1), 2), ((1, 1, 1, 1), 6)]
)
def test_bias_matches_torch(any_blocks, full, kv_heads):
    sizes = [size if whole else 1 for size, whole in zip((3, 6, 13, 17), full, strict=True)]
    inputs = named(*qkv(keys=17, kv_heads=kv_heads), bias=arrays(sizes, seed=2)[0])
    compare(
        lambda q, k, v, bias: sdpa(q, k, v, attn_mask=bias, enable_gqa=True),
        any_blocks,
        inputs,
    )


@pytest.mark.parametrize("shape", [(3, 6, 13, 17), (3, 1, 1, 17)])
def test_mask_matches_torch(implementation, shape):
    mask = np.random.default_rng(3).random(shape) < 0.7
    mask[..., 0] = True
    compare(
        lambda q, k, v: sdpa(q, k, v, attn_mask=torch.from_numpy(mask), enable_gqa=True),
        implementation,
        named(*qkv(keys=17)),
        mask=jnp.asarray(mask),
    )


def distance(queries, keys):
    return np.arange(keys)[None, :] - np.arange(queries)[:, None] - (keys - queries)


@pytest.mark.parametrize(
    "window, causal, left, right",
    [((2, 3), False, 2, 3), (4, False, 4, 4), (4, True, 4, 0), (0, False, 0, 0)],
)
def test_window_matches_masked_torch(any_blocks, window, causal, left, right):
    queries, keys = 19, 23
    away = distance(queries, keys)
    seen = torch.from_numpy((away >= -left) & (away <= right))
    compare(
        lambda q, k, v: sdpa(q, k, v, attn_mask=seen, enable_gqa=True),
        any_blocks,
        named(*qkv(batch=2, queries=queries, keys=keys)),
        window=window,
        causal=causal,
    )


def test_segments_are_separate_sequences(implementation):
    ends = [0, 5, 6, 13]
    ids = np.repeat([4, 2, 9], np.diff(ends))

    def attend(q, k, v):
        parts = [slice(*pair) for pair in itertools.pairwise(ends)]
        each = [
            sdpa(q[:, :, p], k[:, :, p], v[:, :, p], is_causal=True, enable_gqa=True) for p in parts
        ]
        return torch.cat(each, dim=2)

    ids = jnp.tile(ids, (3, 1))
    compare(attend, implementation, named(*qkv()), segment_ids=ids, causal=True)


def test_segments_of_queries_and_keys_may_differ(any_blocks):
    rng = np.random.default_rng(4)
    of_queries, of_keys = rng.integers(0, 3, (3, 13)), rng.integers(0, 3, (3, 17))
    of_keys[:, :3] = [0, 1, 2]
    seen = torch.from_numpy(of_queries[:, None, :, None] == of_keys[:, None, None, :])
    compare(
        lambda q, k, v: sdpa(q, k, v, attn_mask=seen, enable_gqa=True),
        any_blocks,
        named(*qkv(keys=17)),
        segment_ids=(jnp.asarray(of_queries), jnp.asarray(of_keys)),
    )


def test_softcap_and_sliding_window_match_gemma2(any_blocks):
    time, window = 23, 5
    inside = sliding_window_overlay(window)
    seen = torch.tensor([[s <= t and inside(0, 0, t, s) for s in range(time)] for t in range(time)])
    bias = torch.zeros(time, time, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    module = SimpleNamespace(num_key_value_groups=3, training=False)

    def attend(q, k, v):
        out, _ = modeling_gemma2.eager_attention_forward(
            module, q, k, v, bias[None, None], scaling=0.7, softcap=1.3
        )
        return out.transpose(1, 2)

    q, k, v = qkv(queries=time, keys=time)
    (weight,) = arrays((*v.shape[:2], 6, 7), seed=1)
    actual = ours(
        named(q, k, v),
        weight,
        any_blocks,
        causal=True,
        window=window - 1,
        scale=0.7,
        softcap=1.3,
    )
    assert_close(actual, theirs(attend, named(q, k, v), weight))


def test_sinks_match_gpt_oss(any_blocks):
    inputs = named(*qkv(queries=17, keys=17), sinks=arrays((6,), seed=5)[0])
    hidden = torch.ones(17, 17, dtype=torch.bool).triu(1)
    bias = torch.zeros(17, 17, dtype=torch.float64).masked_fill(hidden, -torch.inf)

    def attend(q, k, v, sinks):
        module = SimpleNamespace(num_key_value_groups=3, training=False, sinks=sinks)
        out, _ = modeling_gpt_oss.eager_attention_forward(
            module, q, k, v, bias[None, None], scaling=5**-0.5
        )
        return out.transpose(1, 2)

    compare(attend, any_blocks, inputs, causal=True)


@pytest.mark.parametrize("sinks", [None, np.float32([0.5, -1, 2, 0, 1, -2])])
def test_a_query_without_keys_is_zero_and_takes_no_gradient(implementation, sinks):
    """Causal with more queries than keys: the first T - S queries see nothing."""
    q, k, v = qkv(queries=13, keys=11)
    inputs = named(q, k, v, bias=arrays((6, 13, 11))[0])
    inputs |= {} if sinks is None else {"sinks": sinks}
    (weight,) = arrays((3, 13, 6, 7), seed=1)
    whole = ours(inputs, weight, implementation, causal=True)
    np.testing.assert_array_equal(whole["out"][:, :2], 0)
    np.testing.assert_array_equal(whole["q"][:, :2], 0)
    np.testing.assert_array_equal(whole["bias"][:, :2], 0)
    rest = ours(
        inputs | {"q": q[:, 2:], "bias": inputs["bias"][:, 2:]},
        weight[:, 2:],
        implementation,
        causal=True,
    )
    for name in ("k", "v", "sinks"):
        if name in rest:
            np.testing.assert_allclose(whole[name], rest[name], rtol=1e-5, atol=1e-5)


def test_everything_masked_is_zero_with_zero_gradients(any_blocks):
    (weight,) = arrays((3, 13, 6, 7), seed=1)
    mask = jnp.zeros((13, 13), bool)
    for value in ours(named(*qkv()), weight, any_blocks, mask=mask).values():
        np.testing.assert_array_equal(value, 0)


def test_a_large_sink_takes_everything(implementation):
    inputs = named(*qkv(), sinks=np.float32([200, 200, 0, 0, 200, 0]))
    (weight,) = arrays((3, 13, 6, 7), seed=1)
    actual = ours(inputs, weight, implementation)
    assert all(np.isfinite(x).all() for x in actual.values())
    taken = inputs["sinks"] > 0
    np.testing.assert_array_equal(actual["out"][:, :, taken], 0)
    np.testing.assert_array_equal(actual["sinks"][taken], 0)
    assert np.abs(actual["out"][:, :, ~taken]).max() > 0.1


def test_half_precision_logits_are_in_float32(implementation):
    """Logits of about 30, which bfloat16 would round to eighths."""
    q, k, v = qkv()
    q, k = (jnp.asarray(4 * x, jnp.bfloat16) for x in (q, k))
    out = dot_product_attention(q, k, jnp.asarray(v), implementation=implementation)
    q, k, v = (torch.tensor(np.asarray(x, np.float64)).transpose(1, 2) for x in (q, k, v))
    exact = sdpa(q, k, v, enable_gqa=True).transpose(1, 2)
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(implementation, dtype):
    """4,099 equal weights: summed in bfloat16 they would stop growing at 256."""
    q, k = jnp.zeros((1, 1, 1, 5), dtype), jnp.zeros((1, 4099, 1, 5), dtype)
    v = jnp.ones((1, 4099, 1, 7), jnp.float32)
    out = dot_product_attention(q, k, v, implementation=implementation)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 1.0, rtol=2e-3)
    half = dot_product_attention(q, k, v.astype(dtype), implementation=implementation)
    assert half.dtype == dtype
    np.testing.assert_allclose(half.astype(jnp.float32), 1.0, rtol=8e-3)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_a_number_is_not_forgotten(implementation, name):
    inputs = {"q": (1, 9, 2, 4), "k": (1, 9, 2, 4), "v": (1, 9, 2, 4)}
    inputs = {n: jnp.asarray(arrays(shape)[0]) for n, shape in inputs.items()}
    inputs[name] = inputs[name].at[0, 3, 1, 2].set(jnp.nan)
    attend = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, implementation=implementation))
    lost = np.argwhere(jnp.isnan(attend(**inputs)))
    if name == "q":
        np.testing.assert_array_equal(lost, [[0, 3, 1, c] for c in range(4)])
    else:
        channels = range(4) if name == "k" else [2]
        np.testing.assert_array_equal(lost, [[0, t, 1, c] for t in range(9) for c in channels])


def test_gradients_have_the_dtypes_of_what_they_are_of(implementation):
    """A bias in half precision beside arrays in full, and the other way round."""
    q, k, v = (jnp.asarray(x) for x in qkv())
    (bias,) = arrays((3, 1, 13, 13))
    (weight,) = arrays((3, 13, 6, 7), seed=1)
    for half in ("bias", "q"):
        given = {"q": q, "k": k, "v": v, "bias": jnp.asarray(bias)}
        given[half] = given[half].astype(jnp.bfloat16)
        found = ours(given, weight, implementation)
        for name, x in given.items():
            assert found[name].dtype == x.dtype, name


def test_large_logits_do_not_overflow(implementation):
    q, k, v = (jnp.asarray(x) for x in qkv())
    out = dot_product_attention(300 * q, k, v, implementation=implementation)
    nearest = dot_product_attention(30000 * q, k, v, implementation="naive")
    assert np.isfinite(out).all()
    np.testing.assert_allclose(
        dot_product_attention(30000 * q, k, v, implementation=implementation), nearest, atol=1e-5
    )


def test_leading_dimensions_are_a_batch(implementation):
    shapes = (2, 3, 13, 6, 5), (2, 3, 11, 2, 5), (2, 3, 11, 2, 7), (2, 1, 6, 13, 11)
    q, k, v, bias = (jnp.asarray(x) for x in arrays(*shapes))
    out = dot_product_attention(q, k, v, bias=bias, implementation=implementation)
    alone = dot_product_attention(
        q[1, 2], k[1, 2], v[1, 2], bias=bias[1, 0], implementation=implementation
    )
    np.testing.assert_allclose(out[1, 2], alone, rtol=1e-5, atol=1e-6)
