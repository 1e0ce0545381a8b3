"""RoI max pooling against its definition, pixel by pixel in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from roi_definitions import whole_pixels

from jaxmodels.ops import roi_pool
from jaxmodels.ops.roi_pool import roi_max_pool

IMAGE, CHANNELS, BATCH, COUNT, SIZE, STRIDE = (7, 11), 3, 2, 5, (3, 2), 4


def by_definition(x, rois, cotangent):
    """Values, and each cotangent where the first maximum stands."""
    inside = whole_pixels(rois, SIZE, x.shape[1:3], STRIDE, closed=True)
    out, of_x = np.zeros_like(cotangent), np.zeros_like(x)
    for b, n, p, q, c in np.ndindex(*out.shape):
        values = np.where(inside[b, n, p, q], x[b, :, :, c], -np.inf)
        if inside[b, n, p, q].any():
            out[b, n, p, q, c] = values.max()
            place = np.unravel_index(values.argmax(), values.shape)
            of_x[b, *place, c] += cotangent[b, n, p, q, c]
    return out, of_x


@jax.jit
def ours(x, rois, cotangent):
    out, pull_back = jax.vjp(lambda x, rois: roi_max_pool(x, rois, SIZE, stride=STRIDE), x, rois)
    return out, *pull_back(cotangent)


def draw(seed, image=IMAGE):
    """Whole numbers, so that maxima are equal often."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 4, size=(BATCH, *image, CHANNELS)).astype(np.float32)
    return x, rng.integers(-9, 9, size=(BATCH, COUNT, *SIZE, CHANNELS)).astype(np.float32)


# Multiples of two are halves of pixels of the map often.
coordinates = st.integers(-15, 30).map(lambda n: 2.0 * n) | st.floats(-30, 60, width=32)
odd = st.sampled_from([np.nan, np.inf, -np.inf, 1e9, -1e9])


@settings(deadline=None, max_examples=40)
@given(
    rois=hnp.arrays(np.float32, (BATCH, COUNT, 4), elements=coordinates | odd, fill=st.nothing()),
    seed=st.integers(0, 99),
)
def test_is_its_definition_for_any_regions(rois, seed):
    x, cotangent = draw(seed)
    out, of_x, of_rois = ours(x, rois, cotangent)
    rois = np.clip(rois, -4e6, 4e6, where=np.isfinite(rois), out=rois)
    expected = by_definition(x, rois, cotangent)
    for mine, theirs in zip((out, of_x), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not of_rois.any()


def test_accelerators_and_vmap(monkeypatch):
    x, cotangent = draw(0)
    rois = np.random.default_rng(1).uniform(-8, 48, size=(BATCH, COUNT, 4)).astype(np.float32)
    monkeypatch.setattr(roi_pool, "platform", lambda: "gpu")

    @jax.jit
    @jax.vmap
    def mapped(x, rois, cotangent):
        out, pull_back = jax.vjp(lambda x: roi_max_pool(x, rois, SIZE, stride=STRIDE), x)
        return out, *pull_back(cotangent)

    found = mapped(x[:, None], rois[:, None], cotangent[:, None])
    for mine, theirs in zip(found, by_definition(x, rois, cotangent), strict=True):
        np.testing.assert_array_equal(mine[:, 0], theirs)


def test_a_nan_is_the_maximum_of_its_bin_only_and_no_regions():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    rois = jnp.array([[[0.0, 0, 3, 3]]])
    pool = jax.jit(lambda x, rois: roi_max_pool(x, rois, 2, stride=1))
    assert jnp.isnan(pool(x, rois)[0, 0, :, :, 0]).tolist() == [[False, True], [False, False]]
    assert jax.eval_shape(pool, x, rois[:, :0]).shape == (1, 0, 2, 2, 1)


def test_half_precision_sums_gradients_in_float32():
    """In bfloat16, a sum of ones would stop at 256."""
    rois = jnp.zeros((1, 1000, 4))

    def read(x):
        out = roi_max_pool(x, rois, 1, stride=1)
        return out.astype(jnp.float32).sum(), out

    gradient, out = jax.jit(jax.grad(read, has_aux=True))(jnp.ones((1, 2, 2, 1), jnp.bfloat16))
    assert out.dtype == gradient.dtype == jnp.bfloat16
    assert gradient.astype(jnp.float32).ravel().tolist() == [1000, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rois": (3, 5, 4)}, r"rois \(3, 5, 4\) .* of another batch size than x \(2, 7, 11, 3\)"),
        ({"x": (2, 7, 0, 3)}, "has no pixels to read"),
        ({"stride": -4}, "stride=-4 must be positive"),
        ({"size": 0}, "size=0 must be at least 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": (2, *IMAGE, 3), "rois": (2, 5, 4), "size": 2, "stride": 4, **change}
    x, rois = jnp.zeros(arguments.pop("x")), jnp.zeros(arguments.pop("rois"))
    with pytest.raises(ValueError, match=f"roi_max_pool: .*{message}"):
        roi_max_pool(x, rois, **arguments)
