"""Bad input, the choice of a path, and the accelerators' kernels as far as a CPU goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.ops import attention, attention_fused, dot_product_attention
from jaxmodels.training import make_mesh

# Without the run-time checks of annotations, which the test suite adds.
as_users_run_it = dot_product_attention.__wrapped__


def qkv(batch=3, queries=13, keys=17, heads=6, kv_heads=2, width=5, value_width=7, dtype="float32"):
    shapes = (queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(batch, *s)), dtype) for s in shapes]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"softcap": 0.0}, r"softcap=0.0 must be positive; None"),
        ({"window": (3, 1), "causal": True}, r"window=\(3, 1\) looks to the right.*use \(3, 0\)"),
        ({"window": -1}, r"window=-1 must not be negative"),
        ({"mask": jnp.ones((13, 13), bool)}, r"mask \(13, 13\) .*\(3, 6, 13, 17\)"),
        ({"bias": jnp.ones((2, 6, 13, 17))}, r"bias \(2, 6, 13, 17\) .*\(3, 6, 13, 17\)"),
        ({"bias": jnp.ones((1, 3, 6, 13, 17))}, r"bias \(1, 3, 6, 13, 17\) must be broadcastable"),
        ({"sinks": jnp.ones(2)}, r"sinks must have shape \(6,\).* not \(2,\)"),
        ({"segment_ids": jnp.ones((3, 13), int)}, r"segment_ids .*\(3, 13\).* \(3, 17\) for keys"),
        ({"implementation": "fused"}, r"cpu has no fused kernel; use \"auto\""),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=rf"^dot_product_attention: .*{message}"):
        as_users_run_it(*qkv(), **options)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((3, 13, 6, 5), (3, 17, 4, 5), (3, 17, 4, 7)), "6 query heads are no multiple of 4"),
        (((3, 13, 6, 5), (2, 17, 2, 5), (2, 17, 2, 7)), r"leading dimensions differ: q \(3, 13"),
        (((3, 13, 6, 5), (3, 17, 2, 5), (3, 11, 2, 7)), r"k and v must agree.*\(3, 11, 2, 7\)"),
        (((3, 13, 6, 5), (3, 17, 2, 7), (3, 17, 2, 7)), r"q and k in width.*\(3, 17, 2, 7\)"),
        (((3, 13, 6, 5), (17, 2, 5), (17, 2, 7)), r"same leading dimensions, not q \(3, 13, 6, 5"),
        (((3, 0, 6, 5), (3, 17, 2, 5), (3, 17, 2, 7)), r"empty dimension.*\(3, 0, 6, 5\)"),
    ],
)
def test_bad_shapes_are_named(shapes, message):
    with pytest.raises(ValueError, match=rf"^dot_product_attention: .*{message}"):
        as_users_run_it(*(jnp.zeros(s) for s in shapes))


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation='flash' is none of"):
        as_users_run_it(*qkv(), implementation="flash")


def choice(platform, implementation="auto", arrays=None, **options):
    arrays = arrays or qkv(width=64, value_width=64, queries=256, keys=256, dtype="bfloat16")
    arguments = [*arrays] + [options.pop(n, None) for n in ("bias", "mask", "segment_ids", "sinks")]
    options = {"window": (None, None), "scale": 1.0, "softcap": None} | options
    return attention._choose(implementation, platform, arguments, options).__name__


@pytest.fixture
def recent_gpu(monkeypatch):
    monkeypatch.setattr(attention_fused, "_cuda_capability", lambda: 9.0)


@pytest.mark.usefixtures("recent_gpu")
def test_auto_takes_the_kernel_of_the_platform():
    assert choice("cpu") == "short_attention"
    assert choice("cuda") == choice("cuda", "fused") == "_cudnn_attention"
    assert choice("tpu") == choice("tpu", "fused") == "_splash_attention"
    assert choice("rocm") == "naive_attention"
    for platform in ("cpu", "cuda", "tpu"):
        assert choice(platform, "naive") == "naive_attention"
        assert choice(platform, "blocked") == "blocked_attention"


def some(queries, keys, kv_heads=2):
    """Two images of six heads."""
    return qkv(batch=2, heads=6, kv_heads=kv_heads, queries=queries, keys=keys)


def test_few_logits_are_short_and_many_go_in_blocks():
    assert choice("cpu", arrays=some(592, 590)) == "short_attention"
    assert choice("cpu", arrays=some(592, 590, kv_heads=1)) == "short_attention"
    assert choice("cpu", arrays=some(593, 590)) == "blocked_attention"
    assert choice("cpu", "short", arrays=some(593, 590)) == "short_attention"
    with jax.set_mesh(make_mesh("fsdp=2", jax.devices()[:2])):  # each device has one image
        assert choice("cpu", arrays=some(593, 590)) == "short_attention"
        assert choice("cpu", arrays=some(1186, 590)) == "blocked_attention"


ODD = qkv(width=64, value_width=64, queries=255, keys=256, dtype="bfloat16")
BIAS = jnp.ones((1, 1, 256, 256))
IDS = jnp.ones((3, 256), int)


@pytest.mark.usefixtures("recent_gpu")
@pytest.mark.parametrize(
    "platform, options, reason",
    [
        ("cuda", {"arrays": qkv(width=64, value_width=64)}, "bfloat16 or float16, not float32"),
        ("cuda", {"arrays": qkv(width=64, value_width=32, dtype="float16")}, "K=64, V=32"),
        ("cuda", {"arrays": qkv(width=20, value_width=20, dtype="float16")}, "multiple of 8"),
        ("cuda", {"arrays": ODD, "mask": jnp.ones((1, 1, 1, 256), bool)}, "even lengths"),
        ("cuda", {"softcap": 2.0}, "neither sinks nor softcap"),
        ("cuda", {"sinks": jnp.ones(6)}, "neither sinks nor softcap"),
        ("tpu", {"arrays": ODD}, "multiples of 128"),
        ("tpu", {"bias": BIAS}, "no bias and no mask"),
        ("tpu", {"mask": BIAS > 0}, "no bias and no mask"),
        ("tpu", {"segment_ids": (IDS, IDS + 1)}, "segment_ids leave a query without keys"),
        (
            "tpu",
            {
                "arrays": qkv(width=64, value_width=64, queries=256, keys=128),
                "window": (None, 0),
            },
            "window leaves a query without keys",
        ),
    ],
)
def test_what_a_kernel_lacks_goes_elsewhere_or_is_named(platform, options, reason):
    assert choice(platform, **options) == "naive_attention"
    with pytest.raises(ValueError, match=rf'"fused": .*{reason}.*; use "auto"'):
        choice(platform, "fused", **options)


def test_old_gpus_have_no_fused_kernel(monkeypatch):
    monkeypatch.setattr(attention_fused, "_cuda_capability", lambda: 7.5)
    assert choice("cuda") == "naive_attention"


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (60, 0), "softcap": 3.0},
        {"window": (3, 90), "sinks": jnp.linspace(-1, 1, 4)},
        {"segment_ids": jnp.repeat(jnp.arange(4), 64)[None]},
    ],
)
def test_the_tpu_kernel_interpreted_equals_naive(monkeypatch, options):
    arrays = qkv(1, 256, 256, 4, 2, width=64, value_width=64)

    def run(implementation="auto"):
        def loss(*arrays):
            out = dot_product_attention(
                *arrays, scale=0.2, implementation=implementation, **options
            )
            return jnp.sum(jnp.sin(out))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)

    expected = run()
    interpreted = functools.partial(attention_fused._splash_attention, interpret=True)
    kernel = attention_fused.KERNELS["tpu"]._replace(attend=interpreted)
    monkeypatch.setitem(attention_fused.KERNELS, "tpu", kernel)
    monkeypatch.setattr(attention, "_platform", lambda: "tpu")
    for a, b in zip(jax.tree.leaves(run("fused")), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("recent_gpu")
@pytest.mark.parametrize("queries", [16, 12, 20])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (3, 0)},
        {"window": (3, 2)},
        {"bias": jnp.linspace(-2, 2, 6 * 16).reshape(1, 6, 1, 16)},
        {"mask": jnp.arange(16)[None] % 3 > 0, "causal": True},
        {"segment_ids": True, "causal": True},
    ],
)
def test_the_gpu_path_says_the_same_in_the_words_of_jax_nn(monkeypatch, queries, options):
    """cuDNN is replaced by XLA behind the same function, with the same conventions."""
    arrays = qkv(queries=queries, keys=16, width=8, value_width=8, dtype="float16")
    if "segment_ids" in options:
        ids = jnp.tile(jnp.arange(20) // 5, (3, 1))
        options = options | {"segment_ids": (ids[:, :queries], ids[:, :16])}
    expected = dot_product_attention(*arrays, **options)
    real = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        assert not (kwargs["local_window_size"] or (0, 0))[1]
        return real(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention, "_platform", lambda: "cuda")
    actual = dot_product_attention(*arrays, **options, implementation="fused")
    np.testing.assert_allclose(
        actual.astype("float32"), expected.astype("float32"), rtol=1e-2, atol=4e-3
    )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_other_platforms(monkeypatch, platform):
    """From a CPU: the TPU kernel itself, and XLA on a GPU, whose cuDNN is not here."""
    monkeypatch.setattr(attention, "_platform", lambda: platform)
    arrays = qkv(1, 256, 256, 4, 2, width=64, value_width=64, dtype="bfloat16")

    def loss(*arrays):
        return jnp.sum(dot_product_attention(*arrays, causal=True).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in text) == (platform == "tpu")
