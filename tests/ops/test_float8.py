"""Products of eight bits: rounding by torch and `transformers`, products in NumPy float64."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from jaxmodels import training
from jaxmodels.layers.experts import MixtureOfExperts
from jaxmodels.ops import float8
from jaxmodels.ops.convolution import convolution
from jaxmodels.ops.experts import capacity_experts, dropless_experts
from jaxmodels.ops.linear import linear

EXPERTS, TOKENS, WIDTH, OUT = 3, 149, 139, 131


def spread(rng, *shape):
    """Numbers whose sizes span many powers of two, as activations' do."""
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape))).astype(np.float32)


def rounded(x, tile):
    """By the definition: a tile at a time, cast by torch."""
    out = np.empty(x.shape, np.float64)
    for place in np.ndindex(*x.shape[:-2]):
        for i in range(0, x.shape[-2], tile[0]):
            for j in range(0, x.shape[-1], tile[1]):
                here = *place, slice(i, i + tile[0]), slice(j, j + tile[1])
                part = x[here].astype(np.float64)
                scale = 2.0 ** np.ceil(np.log2(np.abs(part).max() / 448))
                eight = torch.tensor(part / scale).float().to(torch.float8_e4m3fn)
                out[here] = scale * eight.double().numpy()
    return out


@settings(deadline=None, max_examples=12)
@given(
    lead=st.lists(st.integers(1, 3), max_size=1),
    sizes=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    tile=st.tuples(st.sampled_from([1, 5, 8]), st.sampled_from([1, 7, 8])),
)
def test_rounds_each_tile_as_torch_does(lead, sizes, tile):
    x = spread(np.random.default_rng(sum(sizes)), *lead, *sizes)

    @jax.jit
    def there_and_back(x):
        values, scales = float8.quantize(x, tile)
        low = float8.dequantize(values, scales, tile, jnp.bfloat16)
        return values, float8.dequantize(values, scales, tile), low

    values, found, low = jax.device_get(there_and_back(x))
    assert values.dtype == jnp.float8_e4m3fn and values.shape == x.shape
    np.testing.assert_array_equal(found, rounded(x, tile))
    np.testing.assert_array_equal(low.astype(np.float32), found)


def test_blocks_of_a_kernel_equal_transformers_with_scales_of_one_exponent():
    kernel = spread(np.random.default_rng(0), 2, 24, 40)
    settings_ = types.SimpleNamespace(weight_block_size=(8, 8), scale_fmt="ue8m0")
    quantizer = types.SimpleNamespace(quantization_config=settings_)
    theirs = Fp8Quantize(quantizer).convert({"w": torch.tensor(kernel)})
    values, scales = float8.quantize(jnp.asarray(kernel), (8, 8))
    np.testing.assert_array_equal(scales, theirs["w_scale_inv"].float())
    np.testing.assert_array_equal(values.astype(jnp.float32), theirs["w"].float())
    back = Fp8Dequantize(quantizer)._dequantize_one(theirs["w"], theirs["w_scale_inv"].float())
    np.testing.assert_array_equal(float8.dequantize(values, scales, (8, 8)), back)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-35, 448.0, 449.0, 3e38])
def test_tiles_at_the_ends_of_the_range(size):
    x = jnp.full((3, 5), size, jnp.float32)
    values, scales = float8.quantize(x, (3, 5))
    found = float8.dequantize(values, scales, (3, 5))
    np.testing.assert_allclose(found, x, rtol=2**-4, atol=2.0**-108)
    assert np.log2(scales) % 1 == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_tile(bad):
    x = jnp.ones((2, 6)).at[1, 4].set(bad)
    found = float8.dequantize(*float8.quantize(x, (1, 3)), (1, 3))
    assert np.isnan(found[1, 3:]).all()
    np.testing.assert_array_equal(found[0], 1)
    np.testing.assert_array_equal(found[1, :3], 1)


def operands(*sizes):
    rng = np.random.default_rng(1)
    return [spread(rng, *shape) for shape in sizes]


def defined(x, kernel, cotangent, groups):
    """Output and gradients in float64; rows of group e meet kernel e."""
    once, weights = rounded(x, (1, 128)), rounded(kernel, (128, 128))
    turned, by_width = rounded(once, (128, 1)), rounded(cotangent, (1, 128))
    by_token = rounded(cotangent, (128, 1))
    out, dx = np.zeros_like(cotangent, np.float64), np.zeros_like(once)
    dkernel = np.zeros_like(weights)
    for e, rows in enumerate(np.split(np.arange(len(x)), np.cumsum(groups)[:-1])):
        out[rows] = once[rows] @ weights[e]
        dx[rows] = by_width[rows] @ weights[e].T
        dkernel[e] = turned[rows].T @ by_token[rows]
    return out, dx, dkernel


def close(found, expected, tolerance=1e-5):
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=limit)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)])
def test_product_and_both_gradients_equal_the_definition(dtype, tolerance):
    """Tokens differ so much in size that some vanish in a tile that others are in, too."""
    x, kernel, cotangent = operands((TOKENS, WIDTH), (WIDTH, OUT), (TOKENS, OUT))
    sizes = 2.0 ** np.random.default_rng(4).integers(-9, 10, (TOKENS, 1)).astype(np.float32)
    # What a small token adds to the kernel's gradient is as much as what a large one does.
    arrays = [jnp.asarray(a, dtype) for a in (x * sizes, kernel, cotangent / sizes)]
    x, kernel, cotangent = (np.asarray(a, np.float32) for a in arrays)
    out, dx, dkernel = defined(x, kernel[None], cotangent, [TOKENS])
    found, pull = jax.vjp(lambda *a: float8.float8_product(jnp.matmul, *a), *arrays[:2])
    ours = [a.astype(jnp.float32) for a in (found, *pull(arrays[2]))]
    assert {found.dtype, *(a.dtype for a in pull(arrays[2]))} == {jnp.dtype(dtype)}
    close(ours[0] / sizes, out / sizes, tolerance)
    close(ours[1] * sizes, dx * sizes, tolerance)
    close(ours[2], dkernel[0], tolerance)


def test_mapped_over_examples_it_is_each_alone():
    x, kernel = (jnp.asarray(a) for a in operands((3, 5, WIDTH), (WIDTH, OUT)))

    def gradients(x):
        loss = lambda *a: jnp.sum(float8.float8_product(jnp.matmul, *a) ** 2)  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    together = jax.jit(jax.vmap(gradients))(x)
    for i, example in enumerate(x):
        for found, expected in zip(together, gradients(example), strict=True):
            close(found[i], expected)


def test_grouped_product_and_both_gradients_equal_the_definition():
    shapes = (TOKENS, WIDTH), (EXPERTS, WIDTH, OUT), (TOKENS, OUT)
    x, kernel, cotangent = operands(*shapes)
    groups = [70, 0, 79]

    @jax.jit
    def both(x, kernel, cotangent, groups):
        # In a checkpoint the sizes of groups are of another trace in the backward pass.
        product = jax.checkpoint(lambda *a: float8.float8_product(lax.ragged_dot, *a, groups))
        found, pull = jax.vjp(product, x, kernel)
        return found, *pull(cotangent)

    expected = defined(x, kernel, cotangent, groups)
    for ours, theirs in zip(both(x, kernel, cotangent, jnp.array(groups)), expected, strict=True):
        close(ours, theirs)


def test_the_backward_pass_keeps_a_byte_for_each_activation():
    x, kernel = jnp.ones((256, 512), jnp.bfloat16), jnp.ones((512, 128), jnp.bfloat16)
    pull = jax.eval_shape(
        lambda *a: jax.vjp(lambda *b: float8.float8_product(jnp.matmul, *b), *a)[1], x, kernel
    )
    kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pull))
    assert kept == x.size + 4 * x.size // 128 + 2 * kernel.size


def test_layers_round_where_eight_bits_are_asked_for_and_only_in_bfloat16():
    x, kernel = (jnp.asarray(a) for a in operands((2, 7, WIDTH), (WIDTH, OUT)))
    low = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    plain, high = linear(*low), linear(x, kernel)
    with pytest.raises(ZeroDivisionError), float8.float8_products(True):
        np.testing.assert_array_equal(linear(x, kernel), high)
        eight = linear(*low)
        1 / 0  # noqa: B018
    rows = np.asarray(low[0].astype(jnp.float32)).reshape(14, -1)
    exact = rounded(rows, (1, 128)) @ rounded(np.asarray(low[1].astype(jnp.float32)), (128, 128))
    close_to = 2**-8 * np.abs(exact).max()
    np.testing.assert_allclose(eight.astype(jnp.float32).reshape(14, -1), exact, atol=close_to)
    assert np.abs(exact - plain.astype(jnp.float32).reshape(14, -1)).max() > 4 * close_to
    np.testing.assert_array_equal(linear(*low), plain)


def test_what_was_traced_before_is_traced_again():
    """Loss and evaluation may share a jitted function."""
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in operands((5, WIDTH), (WIDTH, OUT)))
    product = jax.jit(linear)
    plain = product(x, kernel)
    with float8.float8_products(True):
        eight = product(x, kernel)
    assert np.any(eight != plain)
    np.testing.assert_array_equal(product(x, kernel), plain)


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_are_not_rounded(size):
    x, kernel = jnp.ones((1, 5, 5, 8), jnp.bfloat16), jnp.ones((size, size, 8, 6), jnp.bfloat16)
    with float8.float8_products(True):
        traced = jax.make_jaxpr(lambda *a: jax.vjp(convolution, *a)[0])(x, kernel)
    assert "f8" not in str(traced)


def mixture(kind):
    """A call of experts, and its arrays."""
    rng = np.random.default_rng(2)
    tokens, weights = spread(rng, 11, 6), np.full((11, 1), 1.0, np.float32)
    matrices = [spread(rng, EXPERTS, 6, 5), spread(rng, EXPERTS, 6, 5), spread(rng, EXPERTS, 5, 6)]
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in (tokens, weights, *matrices)]
    if kind == "dropless":
        choices = jnp.asarray(rng.integers(EXPERTS, size=(11, 1)))
        return lambda x, w, *m: dropless_experts(x, w, choices, *m), arrays
    places = jnp.arange(9).reshape(EXPERTS, 3)
    return lambda x, w, *m: capacity_experts(x, w[places, 0], places, *m), arrays


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_experts_multiply_eight_bits_three_times(kind):
    experts, arrays = mixture(kind)
    plain = experts(*arrays).astype(jnp.float32)
    with float8.float8_products(True):
        found = str(jax.make_jaxpr(experts)(*arrays))
        eight = experts(*arrays).astype(jnp.float32)
    assert found.count("name=float8_product") == 3
    error = np.linalg.norm(eight - plain) / np.linalg.norm(plain)
    assert 1e-3 < error < 0.15


def test_split_over_devices_it_is_what_one_device_computes():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays = operands((512, 160), (160, 256), (512, 256))

    @jax.jit
    def both(x, kernel, cotangent):
        found, pull = jax.vjp(lambda *a: float8.float8_product(jnp.matmul, *a), x, kernel)
        return found, *pull(cotangent)

    expected = both(*map(jnp.asarray, arrays))
    specs = PartitionSpec("data"), PartitionSpec(None, "tensor"), PartitionSpec("data", "tensor")
    parts = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)
    ]
    for found, wanted in zip(both(*parts), expected, strict=True):
        assert len(found.sharding.device_set) == 8
        close(found, wanted)


def test_tokens_that_travel_to_experts_are_rounded_as_those_that_stay():
    """Tokens of a tile are others there, so that gradients of matrices differ a little."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(spread(rng, 8, 6, WIDTH), jnp.bfloat16)
    layer = MixtureOfExperts(num_experts=4, top_k=2, hidden_width=17, dtype=jnp.bfloat16)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]

    def gradients(params, x):
        def loss(params):
            return jnp.mean(layer.apply({"params": params}, x).astype(jnp.float32) ** 2)

        with float8.float8_products(True):
            return jax.value_and_grad(loss)(params)

    loss, alone = jax.jit(gradients)(params, x)
    with jax.set_mesh(training.make_mesh("data=2,expert=4")):
        traced = jax.jit(lambda *a: gradients(*a))
        assert "all_to_all" in str(traced.trace(params, x).jaxpr)
        same, together = traced(params, x)
    np.testing.assert_allclose(same, loss, rtol=1e-3)
    for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert jnp.linalg.norm(found - expected) < 0.01 * jnp.linalg.norm(expected)


def test_experts_of_one_loop_refuse_eight_bits():
    _, (x, weights, *matrices) = mixture("dropless")
    choices = jnp.zeros((len(x), 1), jnp.int32)
    with float8.float8_products(True), pytest.raises(ValueError, match=r"blocked.*use .ragged"):
        dropless_experts(x, weights, choices, *matrices, implementation="blocked")
