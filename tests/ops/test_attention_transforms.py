"""Fast attention under every transformation, against the naive form outside of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.ops import attention_blocked, attention_spans, dot_product_attention

naive = functools.partial(dot_product_attention, implementation="naive")
blocked = functools.partial(dot_product_attention, implementation="blocked")
short = functools.partial(dot_product_attention, implementation="short")


def qkv(*lead, queries=13, keys=17, heads=6, kv_heads=2):
    shapes = (queries, heads, 5), (keys, kv_heads, 5), (keys, kv_heads, 7)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(*lead, *s)), jnp.float32) for s in shapes]


def gradients(attend):
    def loss(*arguments):
        return jnp.sum(jnp.sin(attend(*arguments)))

    return lambda *arguments: jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=2e-6)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_values_and_gradients(self):
        expected = naive(*qkv(3), causal=True), gradients(naive)(*qkv(3))

        @self.variant
        def both(q, k, v):
            return blocked(q, k, v, causal=True), gradients(blocked)(q, k, v)

        assert_close(both(*qkv(3)), expected)


def test_vmap_over_any_axis():
    q, k, v = qkv(3, 2)
    bias = jnp.linspace(-1, 1, 2)

    def attend(q, k, v, bias):
        return blocked(q, k, v, bias=jnp.reshape(bias, (1, 1)), causal=True)

    over = jax.vmap(attend, in_axes=(1, 1, 1, 0), out_axes=1)
    assert_close(over(q, k, v, bias), naive(q, k, v, causal=True))


@pytest.mark.parametrize("spec", [("batch", None, "heads"), (None, None, "heads")])
def test_sharded_equals_one_device(spec):
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = NamedSharding(mesh, PartitionSpec(*spec))
    arrays = qkv(4)
    expected = naive(*arrays, causal=True), gradients(naive)(*arrays)
    attend = jax.jit(
        lambda *x: (blocked(*x, causal=True), gradients(blocked)(*x)),
        in_shardings=(place,) * 3,
    )
    assert_close(attend(*(jax.device_put(x, place) for x in arrays)), expected)


@pytest.mark.parametrize("one", [blocked, short])
def test_shard_map_sums_the_gradients_of_what_is_shared(one):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("batch")
    bias, sinks = jnp.linspace(-1, 1, 6 * 13 * 17).reshape(6, 13, 17), jnp.linspace(-1, 1, 6)

    def attend(q, k, v, bias, sinks):
        inner = jax.shard_map(
            lambda q, k, v, bias, sinks: one(q, k, v, bias=bias, sinks=sinks),
            mesh=mesh,
            in_specs=(spec, spec, spec, PartitionSpec(), PartitionSpec()),
            out_specs=spec,
        )
        return inner(q, k, v, bias, sinks)

    def alone(q, k, v, bias, sinks):
        return naive(q, k, v, bias=bias, sinks=sinks)

    arguments = (*qkv(4), bias, sinks)
    assert_close(jax.jit(attend)(*arguments), alone(*arguments))
    assert_close(jax.jit(gradients(attend))(*arguments), gradients(alone)(*arguments))


def test_new_values_do_not_compile_anew():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attend(q, k, v, ids):
        return dot_product_attention(q, k, v, segment_ids=ids, causal=True)

    q, k, v = qkv(3, queries=17)
    for i in range(3):
        attend(q + i, k * i, v - i, jnp.full((3, 17), i))


def compiled(length, backward, **options):
    array = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    attend = functools.partial(blocked, **options)
    attend = gradients(attend) if backward else attend
    return jax.jit(attend).lower(array, array, array).compile()


@pytest.mark.parametrize(
    "options, backward",
    [({}, False), ({}, True), ({"causal": True}, True)],
)
def test_memory_is_linear_in_the_length(monkeypatch, backward, options):
    monkeypatch.setattr(attention_spans, "MAX_ROWS", 128)
    sizes = [
        compiled(length, backward, **options).memory_analysis().temp_size_in_bytes
        for length in (2048, 8192)
    ]
    assert sizes[1] < 6 * sizes[0]  # four times the length; the square would be 16
    assert sizes[1] < 8192 * 8192 * 4


def test_blocks_are_bounded():
    block = 4 * attention_spans.MAX_LOGITS
    assert compiled(32768, False).memory_analysis().temp_size_in_bytes < 3 * block


def test_hidden_blocks_are_not_computed():
    def flops(**options):
        return compiled(2048, True, **options).cost_analysis()["flops"]

    everything = flops(window=(2048, 2048))  # blocks of the same size, nothing hidden
    assert flops(causal=True) < 0.65 * everything
    assert flops(window=(200, 0)) < 0.4 * everything


@st.composite
def calls(draw):
    """A call with any combination of options that do not contradict each other."""
    batch, group, kv_heads = (draw(st.sampled_from([1, 2, 3])) for _ in range(3))
    queries, keys = draw(st.sampled_from([1, 7, 31])), draw(st.sampled_from([1, 11, 37]))
    heads = group * kv_heads
    rng = np.random.default_rng(draw(st.integers(0, 99)))

    def pairs():
        full = (batch, heads, queries, keys)
        return [size if draw(st.booleans()) else 1 for size in full]

    arrays = {}
    if draw(st.booleans()):
        bias = jnp.asarray(rng.normal(size=pairs()), jnp.float32)
        # Some hide with a bias, and may hide all keys of a query.
        arrays["bias"] = jnp.where(bias < draw(st.sampled_from([-9, 0])), -jnp.inf, bias)
    if draw(st.booleans()):
        arrays["sinks"] = jnp.asarray(rng.normal(size=heads), jnp.float32)
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["mask"] = jnp.asarray(rng.random(pairs()) < 0.7)
    if draw(st.booleans()):
        options["segment_ids"] = (
            jnp.asarray(rng.integers(0, 3, (batch, queries))),
            jnp.asarray(rng.integers(0, 3, (batch, keys))),
        )
    options["window"] = draw(st.sampled_from([None, 0, 5]))
    options["softcap"] = draw(st.sampled_from([None, 1.5]))
    return (
        qkv(batch, queries=queries, keys=keys, heads=heads, kv_heads=kv_heads),
        arrays,
        options,
    )


@settings(max_examples=6, deadline=None)
@given(calls(), st.sampled_from([1, 1 << 20]))
def test_blocked_and_short_equal_naive(call, block_logits):
    (q, k, v), arrays, options = call

    def run(attend):
        def loss(q, k, v, arrays):
            out = attend(q, k, v, **arrays, **options)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, arrays)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_FORWARD_LOGITS", "_BACKWARD_LOGITS"):
            patch.setattr(attention_blocked, name, block_logits)
        for name, value in {"MAX_LOGITS": block_logits, "MIN_ROWS": 3, "MAX_SPANS": 2}.items():
            patch.setattr(attention_spans, name, value)
        actual = run(blocked)
    expected = run(naive)
    assert_close(actual, expected)
    assert_close(run(short), expected)
