"""Position-sensitive pooling against its definitions, pixel by pixel in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from roi_definitions import pooled, pooled_backwards, sampled_bins, whole_pixels

from jaxmodels.ops import cumulative as cumulative_module
from jaxmodels.ops import pixel_sums
from jaxmodels.ops.position_sensitive import ps_roi_align, ps_roi_pool

IMAGE, SIZE, CHANNELS, BATCH, COUNT, STRIDE = (7, 11), (3, 2), 5, 2, 5, 4


def draw(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, *IMAGE, *SIZE, CHANNELS))
    return x, rng.normal(size=(BATCH, COUNT, *SIZE, CHANNELS))


def with_gradient(operation):
    def both(x, rois, cotangent):
        flat = x.reshape(*x.shape[:-3], -1)
        out, pull_back = jax.vjp(lambda x, r: operation(x, r, SIZE, stride=STRIDE), flat, rois)
        of_x, of_rois = pull_back(cotangent)
        return out, of_x.reshape(x.shape), of_rois

    return both


def means(rois):
    inside = whole_pixels(rois, SIZE, IMAGE, STRIDE, closed=False).astype(float)
    return inside / np.maximum(inside.sum(axis=(-2, -1), keepdims=True), 1)


def samples(rois):
    return sampled_bins(rois, SIZE, IMAGE, STRIDE)


# Multiples of two are halves of pixels of the map often.
coordinates = st.integers(-15, 30).map(lambda n: 2.0 * n) | st.floats(-30, 60, width=32)
regions = hnp.arrays(
    np.float64,
    (BATCH, COUNT, 4),
    elements=coordinates | st.sampled_from([np.nan, np.inf]),
    fill=st.nothing(),
)


@pytest.mark.parametrize(
    ("operation", "definition"), [(ps_roi_pool, means), (ps_roi_align, samples)]
)
def test_is_its_definition_for_any_regions(operation, definition):
    with jax.enable_x64(True):
        apply = jax.jit(with_gradient(operation))

        @settings(deadline=None, max_examples=25)
        @given(rois=regions, seed=st.integers(0, 99))
        def check(rois, seed):
            x, cotangent = draw(seed)
            out, of_x, of_rois = apply(x, rois, cotangent)
            weights = definition(rois)
            np.testing.assert_allclose(out, pooled(weights, x), atol=1e-9)
            expected = pooled_backwards(weights, cotangent, own_channels=True)
            np.testing.assert_allclose(of_x, expected, atol=1e-9)
            assert not of_rois.any()

        check()


@pytest.mark.parametrize(
    ("operation", "definition"), [(ps_roi_pool, means), (ps_roi_align, samples)]
)
def test_float32_on_accelerators_and_vmap(monkeypatch, operation, definition):
    for module in (cumulative_module, pixel_sums):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    x, cotangent = draw(0)
    rois = np.random.default_rng(1).uniform(-8, 48, size=(BATCH, COUNT, 4))
    weights = definition(rois)
    inputs = (jnp.asarray(a[:, None], jnp.float32) for a in (x, rois, cotangent))
    out, of_x, _ = jax.jit(jax.vmap(with_gradient(operation)))(*inputs)
    np.testing.assert_allclose(out[:, 0], pooled(weights, x), rtol=1e-4, atol=1e-5)
    expected = pooled_backwards(weights, cotangent, own_channels=True)
    np.testing.assert_allclose(of_x[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_sums_to_corners_lose_little():
    """A large map with a large mean, and a bin of one pixel in its far corner."""
    x = 1000 + np.random.default_rng(0).normal(size=(1, 200, 300, 1)).astype(np.float32)
    rois = jnp.array([[[299.0, 199, 300, 200], [0, 0, 300, 200]]])
    out = jax.jit(lambda x: ps_roi_pool(x, rois, 1, stride=1))(x)
    expected = [x[0, -1, -1, 0], np.mean(x, dtype=np.float64)]
    np.testing.assert_allclose(out.ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize("operation", [ps_roi_pool, ps_roi_align])
def test_half_precision_and_no_regions(operation):
    x = jnp.full((1, 40, 40, 1), 1 / 3, jnp.bfloat16)
    out = jax.jit(lambda x: operation(x, jnp.array([[[4.0, 4, 36, 36]]]), 1, stride=1))(x)
    assert out.dtype == jnp.bfloat16 and out.ravel()[0] == x[0, 0, 0, 0]
    nothing = jax.eval_shape(lambda x: operation(x, jnp.zeros((1, 0, 4)), 1, stride=1), x)
    assert nothing.shape == (1, 0, 1, 1, 1)


@pytest.mark.parametrize("operation", [ps_roi_pool, ps_roi_align])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 7, 11, 31)}, r"the 31 channels of x .* not for 3 x 2 bins; .* a multiple of 6"),
        ({"rois": (3, 5, 4)}, r"rois \(3, 5, 4\) .* of another batch size than x \(2, 7, 11, 30\)"),
        ({"stride": 0}, "stride=0 must be positive"),
    ],
)
def test_bad_input(operation, change, message):
    arguments = {"x": (2, *IMAGE, 30), "rois": (2, 5, 4), "size": SIZE, "stride": 4, **change}
    x, rois = jnp.zeros(arguments.pop("x")), jnp.zeros(arguments.pop("rois"))
    with pytest.raises(ValueError, match=f"{operation.__name__}: .*{message}"):
        operation(x, rois, **arguments)


def test_a_ratio_is_positive():
    with pytest.raises(ValueError, match="ps_roi_align: sampling_ratio=0 must be at least 1"):
        ps_roi_align(jnp.zeros((1, 5, 5, 1)), jnp.zeros((1, 1, 4)), 1, stride=1, sampling_ratio=0)
