"""What computes in which type: against NumPy, and runs of every policy against float32."""

import collections
import functools

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels import create_model, training
from jaxmodels.layers.linear import Linear
from jaxmodels.models.generative.dit import DiT
from jaxmodels.training.precision import cast_floating, float32_where_kept, matching_paths, products

LOW = pytest.mark.parametrize("precision", ["bfloat16", "float16"])
IN, HIDDEN, OUT = 5, 13, 3


class Twofold(nn.Module):
    """A body that rounds, and a head that may not."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        body = Linear(HIDDEN, dtype=self.dtype, name="body")(x)
        head = Linear(OUT, dtype=self.dtype, name="head")(body)
        return body, head


def first_step(model, precision, example, **options):
    """The outputs of the first step, which a loss reports, and the initial parameters."""
    optimizer = optax.sgd(0.1)

    def loss(params, batch, key):
        body, head = model.apply({"params": params}, **batch)
        return head.astype(jnp.float32).mean(), {"body": body, "head": head}

    state = training.init_state(model, optimizer, jax.random.key(1), example, precision=precision)
    params = jax.device_get(state.params)
    step = training.make_step(loss, optimizer, precision=precision, **options)
    return step(state, example)[1], params


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x, dtype), np.float64)


# A product has six: both factors, and backward the kernel, x, and twice what came.
CAST = "new_dtype=float8_e4m3fn"


@LOW
def test_a_named_layer_computes_in_float32(precision):
    """Its product of 13 rounded numbers is exact to float32; that of its neighbour is not."""
    low = training.compute_dtype(precision)
    example = {"x": np.random.default_rng(0).normal(size=(7, IN)).astype(np.float32)}
    found, params = first_step(Twofold(low), precision, example, keep_float32=r"^head/")
    body, head = found["body"], found["head"]
    assert (body.dtype, head.dtype) == (low, jnp.float32)
    expected = np.float64(body) @ np.float64(params["head"]["kernel"])
    np.testing.assert_allclose(head, expected, rtol=1e-5, atol=1e-6)
    rough = np.float64(body) @ rounded(params["head"]["kernel"], low)
    assert np.abs(head - rough).max() > 1e-4
    exact = np.float64(example["x"]) @ np.float64(params["body"]["kernel"])
    assert 1e-4 < np.abs(np.float64(body) - exact).max() < 5e-2
    without, _ = first_step(Twofold(low), precision, example)
    assert without["head"].dtype == low


def test_one_parameter_of_a_layer_is_enough_and_the_dtype_comes_back():
    x = jnp.ones((2, IN))
    model = Twofold(jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    kept = matching_paths(params, "head/kernel|nothing")
    assert kept == {"head/kernel"}
    bound = model.bind({"params": cast_floating(params, jnp.bfloat16, kept)})
    for whole in (False, True):
        given = params if whole else bound.variables["params"]
        bound = model.bind({"params": given})
        with float32_where_kept():
            found = bound(x)
        assert [y.dtype for y in found] == [jnp.float32 if whole else jnp.bfloat16, jnp.float32]
        assert bound.dtype == jnp.bfloat16
        assert {y.dtype for y in bound(x)} == {jnp.dtype(jnp.bfloat16)}


def dit(dtype):
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 1, "num_classes": 3}
    return DiT(**sizes, width=16, depth=2, num_heads=2, dtype=dtype)


def dit_example():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(6, 4, 4, 1)).astype(np.float32),
        "timesteps": rng.random(6).astype(np.float32),
        "labels": rng.integers(3, size=6).astype(np.int32),
    }


@functools.cache
def dit_trained(precision):
    """The losses of a few steps of a DiT, which is compiled once for each policy."""
    optimizer, example = optax.adam(1e-2), dit_example()
    model = dit(training.compute_dtype(precision))

    def loss(params, batch, key):
        out = model.apply({"params": params}, **batch)
        return jnp.mean((out.astype(jnp.float32) - batch["x"]) ** 2), {}

    state = training.init_state(model, optimizer, jax.random.key(0), example, precision=precision)
    step, found = training.make_step(loss, optimizer, precision=precision), []
    for _ in range(12):
        state, metrics = step(state, example)
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.05), ("float8", 0.15)]
)
def test_a_low_policy_trains_a_dit_as_float32_does(precision, tolerance):
    exact, low = dit_trained("float32"), dit_trained(precision)
    np.testing.assert_allclose(low, exact, rtol=tolerance)
    assert low[-1] < 0.8 * low[0]


@pytest.mark.parametrize("remat", ["dots", "blocks", "everything"])
def test_what_is_computed_again_is_rounded_again(remat):
    """In blocks that are scanned."""
    example = jax.tree.map(jnp.asarray, dit_example())

    def gradient(remat):
        model = dit(jnp.bfloat16).clone(remat=remat)
        variables = jax.jit(model.init)(jax.random.key(0), **example)
        low = jax.tree.map(lambda a: (a + 0.1).astype(jnp.bfloat16), variables)
        loss = lambda v: jnp.mean(model.apply(v, **example).astype(jnp.float32) ** 2)  # noqa: E731
        with products("float8"):
            assert CAST in str(jax.make_jaxpr(jax.grad(loss))(low))
            return jax.jit(jax.grad(loss))(low)

    found, expected = gradient(remat), gradient("none")
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        limit = 2**-6 * float(jnp.abs(plain).max()) + 1e-6
        np.testing.assert_allclose(np.float32(ours), np.float32(plain), rtol=0, atol=limit)


def test_float8_trains_latent_attention_and_experts_as_float32_does():
    """DeepSeek-V3's own: its router and its logits are not among what is rounded."""
    sizes = {"width": 24, "depth": 2, "dense_depth": 1, "num_heads": 2, "mlp_width": 40}
    sizes |= {"q_rank": 12, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    sizes |= {"num_experts": 4, "top_k": 2, "expert_width": 16, "groups": 1, "top_groups": 1}
    rng, optimizer = np.random.default_rng(0), optax.adam(1e-2)
    tokens = rng.integers(11, size=(4, 13)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    found, rounded_products = {}, {}
    for precision in ("float32", "bfloat16", "float8"):
        dtype = training.compute_dtype(precision)
        model = create_model("deepseek_v3", **sizes, vocab_size=11, num_ahead=0, dtype=dtype)
        state = training.init_state(
            model, optimizer, jax.random.key(0), {"tokens": batch["tokens"]}, precision=precision
        )
        step = training.make_step(model.loss, optimizer, precision=precision)
        rounded_products[precision] = str(step.trace(state, batch).jaxpr).count(CAST) / 6
        found[precision] = []
        for _ in range(12):
            state, metrics = step(state, batch)
            found[precision].append(float(metrics["loss"]))
    # Of each block's attention: down and up of queries, down of keys and values, and out, but
    # not up of keys and values, which is part of the products of attention; then the gate, up
    # and down of the dense map, of the experts and of the one that all tokens share.
    assert rounded_products == {"float32": 0, "bfloat16": 0, "float8": 2 * 5 + 3 + 3 + 3}
    np.testing.assert_allclose(found["float8"], found["float32"], rtol=0.05)
    assert found["float8"] != found["bfloat16"]
    assert found["float8"][-1] < 0.8 * found["float8"][0]


@pytest.fixture(scope="module")
def dit_step():
    """Traces a step of a bfloat16 DiT and counts its matrix products by type."""
    model, optimizer, example = dit(jnp.bfloat16), optax.sgd(0.1), dit_example()

    def loss(params, batch, key):
        return jnp.mean(model.apply({"params": params}, **batch) ** 2), {}

    state = training.init_state(model, optimizer, jax.random.key(0), example)

    @functools.cache
    def products(pattern):
        step = training.make_step(loss, optimizer, precision="bfloat16", keep_float32=pattern)
        return collections.Counter(_products(step.trace(state, example).jaxpr))

    return products


@pytest.mark.parametrize(
    ("pattern", "kept"), [(r"blocks/attention/", 2), (r"blocks/mlp/down", 1), (r"^blocks/", 5)]
)
def test_layers_of_a_scanned_stack_compute_in_float32(dit_step, pattern, kept):
    """The stream between blocks keeps its type, or scan would not take the step."""
    usual, found = dit_step(None), dit_step(pattern)
    moved = found["float32"] - usual["float32"]
    assert moved == usual["bfloat16"] - found["bfloat16"]
    # One forward, and one for the gradient of either factor; q, k and v are one product.
    assert moved == 3 * kept


@pytest.mark.parametrize(("pattern", "rounded"), [(None, 2), (r"^head/", 1), (r"", 0)])
def test_layers_kept_in_float32_are_not_rounded_to_float8(pattern, rounded):
    model, optimizer, example = Twofold(jnp.bfloat16), optax.sgd(0.1), {"x": jnp.ones((2, IN))}

    def loss(params, batch, key):
        return model.apply({"params": params}, **batch)[1].mean(), {}

    state = training.init_state(model, optimizer, jax.random.key(0), example)
    step = training.make_step(loss, optimizer, precision="float8", keep_float32=pattern)
    assert str(step.trace(state, example).jaxpr).count(CAST) == 6 * rounded


def _products(jaxpr):
    """The type of every matrix product in a traced function."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield str(equation.invars[0].aval.dtype)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _products(inner)


@LOW
def test_a_low_policy_trains_a_perceptron_as_float32_does(problem, precision):
    def losses(precision):
        optimizer, stream = problem.optimizer(warmup=0), problem.stream()
        state = problem.state(optimizer, precision=precision)
        step, found = training.make_step(problem.loss, optimizer, precision=precision), []
        for _ in range(30):
            state, metrics = step(state, next(stream))
            found.append(float(metrics["loss"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
        return np.array(found)

    exact, low = losses("float32"), losses(precision)
    np.testing.assert_allclose(low, exact, rtol=0.05)
    assert np.abs(low - exact).max() > 0
    assert low[-5:].mean() < 0.7 * low[:5].mean()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[", r"keep_float32='\[' is not a regular expression"),
        ("norm", r"keep_float32='norm' is found in no parameter; there are Dense_0/bias"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bad_patterns(problem, pattern, message, precision):
    optimizer = problem.optimizer()
    step = training.make_step(problem.loss, optimizer, precision=precision, keep_float32=pattern)
    with pytest.raises(ValueError, match=message):
        step(problem.state(optimizer), next(problem.stream()))


def test_unknown_precision_is_refused_by_the_state_too(problem):
    with pytest.raises(ValueError, match=r"precision='float4'.*float32, bfloat16, float16, float8"):
        problem.state(problem.optimizer(), precision="float4")
