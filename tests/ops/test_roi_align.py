"""RoIAlign against its definition, pixel by pixel in NumPy, and torch's grid_sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from roi_definitions import pooled, pooled_backwards, sampled_bins

from jaxmodels.ops import pixel_sums
from jaxmodels.ops.roi_align import roi_align

IMAGE, CHANNELS, BATCH, COUNT = (7, 11), 3, 2, 5
# Inside, over the edges, outside, of no size, inside out, and not a region at all.
ODD = [(3, 5, 41, 31), (-30, -9, 60, 25), (900, 0, 990, 40), (8, 8, 8, 8), (50, 40, 10, 5)]
ROIS = np.array([ODD, [(np.nan, 0, 9, 9), (0, 0, np.inf, 9), *ODD[:3]]], np.float64)


def draw(seed, size, image=IMAGE):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, *image, CHANNELS))
    return x, rng.normal(size=(BATCH, COUNT, *size, CHANNELS))


def with_gradient(**options):
    @jax.jit
    def both(x, rois, cotangent):
        out, pull_back = jax.vjp(lambda x, rois: roi_align(x, rois, **options), x, rois)
        return out, *pull_back(cotangent)

    return both


in_pixels = hnp.arrays(
    np.float64,
    (BATCH, COUNT, 4),
    elements=st.floats(-30, 80, width=32) | st.sampled_from([0.0, 2.0, 44.0, 28.0, np.nan]),
    fill=st.nothing(),
)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (2, 3), "stride": 4, "aligned": True, "sampling_ratio": 2},
        {"size": (3, 2), "stride": 4.5, "aligned": False, "sampling_ratio": 3},
    ],
)
def test_is_its_definition_for_any_regions(options):
    """In float64: a sample next to the limit of the border must not cross it by rounding."""
    x, cotangent = draw(0, options["size"])
    with jax.enable_x64(True):
        apply = with_gradient(**options)

        @settings(deadline=None, max_examples=20)
        @given(rois=in_pixels)
        def check(rois):
            out, of_x, of_rois = apply(x, rois, cotangent)
            weights = sampled_bins(
                rois,
                options["size"],
                IMAGE,
                options["stride"],
                options["sampling_ratio"],
                aligned=options["aligned"],
            )
            np.testing.assert_allclose(out, pooled(weights, x), atol=1e-9)
            np.testing.assert_allclose(of_x, pooled_backwards(weights, cotangent), atol=1e-9)
            assert not of_rois.any()

        check()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("image", [IMAGE, (1, 1)])
def test_odd_regions_in_float32_and_on_accelerators(monkeypatch, device, image):
    monkeypatch.setattr(pixel_sums, "platform", lambda: device)
    x, cotangent = draw(1, (5, 5), image)
    weights = sampled_bins(ROIS, (5, 5), image, 4, 1)
    apply = with_gradient(size=5, stride=4, sampling_ratio=1)
    inputs = (jnp.asarray(a, jnp.float32) for a in (x, ROIS, cotangent))
    out, of_x, _ = apply(*inputs)
    np.testing.assert_allclose(out, pooled(weights, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_x, pooled_backwards(weights, cotangent), rtol=1e-4, atol=1e-4)
    assert (out[0, 2] == 0).all() and (out[1, :2] == 0).all()


def test_equals_sampling_by_torch():
    """A grid of twice as many points, averaged two by two; all points are in the image."""
    x, cotangent = draw(2, (2, 3))
    rois = np.sort(np.random.default_rng(3).uniform(2, 26, size=(BATCH, COUNT, 2, 2)), axis=2)
    rois = rois.reshape(BATCH, COUNT, 4)
    rows, columns = IMAGE
    points = [
        (rois[..., i, None] + (rois[..., i + 2] - rois[..., i])[..., None] * shares) / 4
        for i, shares in ((0, (np.arange(6) + 0.5) / 6), (1, (np.arange(4) + 0.5) / 4))
    ]
    px, py = 2 * points[0] / columns - 1, 2 * points[1] / rows - 1
    shape = (BATCH, COUNT, 4, 6)
    grid = np.stack(
        [np.broadcast_to(px[:, :, None], shape), np.broadcast_to(py[..., None], shape)], -1
    )
    image = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    read = torch.nn.functional.grid_sample(
        image, torch.tensor(grid.reshape(BATCH, -1, 6, 2)), align_corners=False
    )
    expected = torch.nn.functional.avg_pool2d(read, 2).reshape(BATCH, CHANNELS, COUNT, 2, 3)
    expected.backward(torch.tensor(cotangent).permute(0, 4, 1, 2, 3))
    inputs = (jnp.asarray(a, jnp.float32) for a in (x, rois, cotangent))
    out, of_x, _ = with_gradient(size=(2, 3), stride=4)(*inputs)
    np.testing.assert_allclose(out, expected.detach().permute(0, 2, 3, 4, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_x, image.grad.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_vmap_and_no_regions():
    x, _ = draw(4, (2, 3))
    x, rois = jnp.asarray(x, jnp.float32), jnp.asarray(ROIS, jnp.float32)

    def loss(x, rois):
        return jnp.sum(jnp.sin(roi_align(x, rois, (2, 3), stride=4)), axis=(1, 2, 3, 4)).sum()

    alone = jax.jit(jax.value_and_grad(loss))(x, rois)
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x[:, None], rois[:, None])
    np.testing.assert_allclose(mapped[0].sum(), alone[0], rtol=1e-5)
    np.testing.assert_allclose(mapped[1][:, 0], alone[1], rtol=1e-5, atol=1e-5)
    nothing = jax.eval_shape(lambda: jax.grad(loss)(x, rois[:, :0]))
    assert nothing.shape == x.shape
    assert roi_align(x, rois[:, :0], 2, stride=4).shape == (BATCH, 0, 2, 2, CHANNELS)


def test_half_precision_keeps_the_points():
    """In bfloat16, 200.75 is 201, and sums of many small gradients stop growing."""
    x = jnp.arange(256.0).reshape(1, 1, 256, 1).astype(jnp.bfloat16)
    rois = jnp.broadcast_to(jnp.array([201.25, 0.0, 201.25, 1.0]), (1, 1000, 4))

    def read(x):
        out = roi_align(x, rois, 1, stride=1, sampling_ratio=1)
        return out.astype(jnp.float32).sum(), out

    gradient, out = jax.jit(jax.grad(read, has_aux=True))(x)
    assert out.dtype == gradient.dtype == jnp.bfloat16
    assert abs(float(out[0, 0, 0, 0, 0]) - 200.75) < 0.5
    np.testing.assert_allclose(
        gradient[0, 0, 200:202, 0].astype(jnp.float32), [250, 750], rtol=1e-2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rois": (3, 5, 4)}, r"rois \(3, 5, 4\) .* of another batch size than x \(2, 7, 11, 3\)"),
        ({"x": (2, 0, 11, 3)}, "has no pixels to read"),
        ({"stride": 0}, "stride=0 must be positive"),
        ({"stride": float("nan")}, "stride=nan must be positive"),
        ({"sampling_ratio": 0}, "sampling_ratio=0 must be at least 1; .* no static shape"),
        ({"size": (2, 0)}, r"size=\(2, 0\) must be at least 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": (2, *IMAGE, 3), "rois": (2, 5, 4), "size": 2, "stride": 4, **change}
    x, rois = jnp.zeros(arguments.pop("x")), jnp.zeros(arguments.pop("rois"))
    with pytest.raises(ValueError, match=f"roi_align: .*{message}"):
        roi_align(x, rois, **arguments)
