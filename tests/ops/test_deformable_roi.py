"""Deformable RoI pooling against its definition in NumPy, and offsets' gradients in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roi_definitions import pooled, pooled_backwards, sampled_bins

from jaxmodels.ops.deformable_roi import deformable_ps_roi_pool, deformable_roi_pool
from jaxmodels.ops.roi_align import roi_align

IMAGE, SIZE, CHANNELS, BATCH, COUNT, STRIDE, SCALE = (7, 11), (3, 2), 5, 2, 5, 4, 0.3
ROIS = np.array([(3, 5, 41, 31), (-30, -9, 60, 25), (90, 0, 99, 40), (8, 8, 8, 8), (50, 40, 10, 5)])


def draw(seed, own_channels):
    """Map, regions, offsets, mask and cotangent; channels (PY, PX, C) are kept apart."""
    rng = np.random.default_rng(seed)
    bins = (BATCH, COUNT, *SIZE)
    x = rng.normal(size=(BATCH, *IMAGE, *(SIZE if own_channels else ()), CHANNELS))
    rois = np.stack([ROIS, rng.uniform(0, 44, size=ROIS.shape)])
    return x, rois, rng.normal(size=(*bins, 2)), rng.uniform(size=bins), rng.normal(size=(*bins, 5))


def ours(operation):
    @jax.jit
    def both(x, rois, offsets, mask, cotangent):
        def apply(x, rois, offsets, mask):
            flat = x.reshape(*x.shape[:3], -1)
            return operation(flat, rois, offsets, SIZE, stride=STRIDE, scale=SCALE, mask=mask)

        out, pull_back = jax.vjp(apply, x, rois, offsets, mask)
        return out, *pull_back(cotangent)

    return both


def in_torch(x, rois, offsets, cotangent):
    """Gradient of offsets alone: each sample read by grid_sample, those outside set to zero."""
    offsets = torch.tensor(offsets, requires_grad=True)
    sides = (rois[..., 2:] - rois[..., :2])[..., ::-1] / STRIDE
    starts = rois[..., 1::-1] / STRIDE - 0.5
    total = 0
    for p, q in np.ndindex(*SIZE):
        for r, s in np.ndindex(2, 2):
            cell = np.array([(p + (r + 0.5) / 2) / SIZE[0], (q + (s + 0.5) / 2) / SIZE[1]])
            at = torch.tensor(starts + sides * cell)
            at = at + SCALE * torch.tensor(sides.copy()) * offsets[:, :, p, q]
            limits = torch.tensor(IMAGE)
            inside = ((at >= -1) & (at <= limits)).all(dim=-1)
            grid = (2 * at / (limits - 1) - 1).flip(-1)[:, :, None]
            own = torch.tensor(x[:, :, :, p, q] if x.ndim == 6 else x).permute(0, 3, 1, 2)
            read = torch.nn.functional.grid_sample(
                own, grid, padding_mode="border", align_corners=True
            )
            read = read[..., 0].permute(0, 2, 1) * inside[..., None]
            total = total + (read * torch.tensor(cotangent[:, :, p, q])).sum() / 4
    total.backward()
    return offsets.grad


@pytest.mark.parametrize("own_channels", [False, True])
def test_is_its_definition_with_all_gradients(own_channels):
    operation = deformable_ps_roi_pool if own_channels else deformable_roi_pool
    with jax.enable_x64(True):
        apply = ours(operation)

        @settings(deadline=None, max_examples=8)
        @given(seed=st.integers(0, 999))
        def check(seed):
            x, rois, offsets, mask, cotangent = draw(seed, own_channels)
            out, of_x, of_rois, of_offsets, of_mask = apply(x, rois, offsets, mask, cotangent)
            weights = sampled_bins(rois, SIZE, IMAGE, STRIDE, moves=SCALE * offsets)
            plain, scaled = pooled(weights, x), cotangent * mask[..., None]
            np.testing.assert_allclose(out, plain * mask[..., None], atol=1e-9)
            expected = pooled_backwards(weights, scaled, own_channels)
            np.testing.assert_allclose(of_x, expected, atol=1e-9)
            np.testing.assert_allclose(of_mask, np.sum(cotangent * plain, axis=-1), atol=1e-9)
            np.testing.assert_allclose(of_offsets, in_torch(x, rois, offsets, scaled), atol=1e-8)
            assert not of_rois.any()

        check()


def test_without_offsets_it_is_roi_align_and_vmaps():
    x, rois, offsets, mask, _ = (jnp.asarray(a, jnp.float32) for a in draw(0, False))
    operation = jax.jit(lambda *a, mask: deformable_roi_pool(*a, SIZE, stride=STRIDE, mask=mask))
    rigid = jax.jit(lambda x: roi_align(x, rois, SIZE, stride=STRIDE))(x)
    still = operation(x, rois, 0 * offsets, mask=None)
    np.testing.assert_allclose(still, rigid, rtol=1e-5, atol=1e-6)
    inputs = (x, rois, offsets)
    mapped = jax.vmap(lambda *a, mask: operation(*a, mask=mask))(
        *(a[:, None] for a in inputs), mask=mask[:, None]
    )
    found = operation(*inputs, mask=mask)
    np.testing.assert_allclose(mapped[:, 0], found, rtol=1e-4, atol=1e-5)


def test_half_precision():
    x, rois, offsets, mask, _ = (jnp.asarray(a, jnp.float32) for a in draw(0, False))
    half = jax.eval_shape(
        lambda x: deformable_roi_pool(x, rois, offsets, SIZE, stride=STRIDE, mask=mask),
        x.astype(jnp.bfloat16),
    )
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("operation", [deformable_roi_pool, deformable_ps_roi_pool])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": (2, 5, 3, 2)}, r"offsets .* must be \(B, N, PY, PX, 2\) = \(2, 5, 3, 2, 2\)"),
        ({"mask": (2, 5, 2, 3)}, r"mask .* must be \(B, N, PY, PX\) = \(2, 5, 3, 2\)"),
        ({"rois": (3, 5, 4)}, r"rois \(3, 5, 4\) .* of another batch size"),
        ({"sampling_ratio": 0}, "sampling_ratio=0 must be at least 1"),
    ],
)
def test_bad_input(operation, change, message):
    arguments = {"x": (2, *IMAGE, 30), "rois": (2, 5, 4), "offsets": (2, 5, 3, 2, 2), **change}
    arguments = {k: jnp.zeros(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"{operation.__name__}: .*{message}"):
        operation(**arguments, size=SIZE, stride=4)


def test_channels_are_for_the_bins():
    with pytest.raises(ValueError, match=r"deformable_ps_roi_pool: the 5 channels .* 3 x 2 bins"):
        deformable_ps_roi_pool(
            jnp.zeros((1, 7, 7, 5)),
            jnp.zeros((1, 1, 4)),
            jnp.zeros((1, 1, 3, 2, 2)),
            SIZE,
            stride=1,
        )
