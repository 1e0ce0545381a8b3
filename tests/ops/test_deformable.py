"""Deformable convolution against a composition of torch's grid_sample, tap by tap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.convolution import convolution
from jaxmodels.ops.deformable import deformable_convolution


def by_definition(x, kernel, offsets, mask, stride, sides, dilation, groups, offset_groups):
    """torch: every tap sampled alone, and a 1 x 1 convolution of each added up."""
    _, rows, columns, _ = x.shape
    _, high, wide = offsets.shape[:3]
    x = x.permute(0, 3, 1, 2)
    out = 0
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            parts = []
            for g, part in enumerate(x.chunk(offset_groups, dim=1)):
                y = torch.arange(high)[:, None] * stride[0] + i * dilation[0] - sides[0][0]
                z = torch.arange(wide)[None, :] * stride[1] + j * dilation[1] - sides[1][0]
                py, px = y + offsets[:, :, :, g, i, j, 0], z + offsets[:, :, :, g, i, j, 1]
                grid = torch.stack([2 * px / (columns - 1) - 1, 2 * py / (rows - 1) - 1], dim=-1)
                read = torch.nn.functional.grid_sample(
                    part, grid, padding_mode="zeros", align_corners=True
                )
                parts.append(read if mask is None else read * mask[:, None, :, :, g, i, j])
            weight = kernel[i, j].T[:, :, None, None]
            tap = torch.cat(parts, dim=1)
            out = out + torch.nn.functional.conv2d(tap, weight, groups=groups)
    return out.permute(0, 2, 3, 1)


def draw(seed, *, kernel_size, stride, sides, dilation, groups, offset_groups, masked):
    """Inputs and a cotangent, in float64."""
    rng = np.random.default_rng(seed)
    channels, features, image = 6, 2 * groups, (7, 11)
    size = [
        (n + sum(side) - d * (k - 1) - 1) // s + 1
        for n, side, d, k, s in zip(image, sides, dilation, kernel_size, stride, strict=True)
    ]
    taps = (2, *size, offset_groups, *kernel_size)
    x, kernel = (
        rng.normal(size=(2, *image, channels)),
        rng.normal(size=(*kernel_size, channels // groups, features)),
    )
    offsets = rng.normal(0, 2, size=(*taps, 2))
    mask = rng.uniform(size=taps) if masked else None
    return [x, kernel, offsets, mask], rng.normal(size=(2, *size, features))


def torchs(inputs, cotangent, *geometry):
    leaves = [None if a is None else torch.tensor(a, requires_grad=True) for a in inputs]
    out = by_definition(*leaves, *geometry)
    out.backward(torch.tensor(cotangent))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def ours(inputs, cotangent, **options):
    present = [a for a in inputs if a is not None]

    def apply(x, kernel, offsets, mask=None):
        return deformable_convolution(x, kernel, offsets, mask=mask, **options)

    @jax.jit
    def both(*present):
        out, pull_back = jax.vjp(apply, *present)
        return out, *pull_back(cotangent)

    return both(*present)


small = st.tuples(st.integers(1, 3), st.integers(1, 3))
side = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(deadline=None, max_examples=5)
@given(
    kernel_size=small,
    stride=small,
    sides=st.tuples(side, side),
    dilation=small,
    groups=st.sampled_from([1, 2, 3, 6]),
    offset_groups=st.sampled_from([1, 2, 3]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_torch_in_values_and_all_gradients(seed, masked, **options):
    """In float64: a point next to a pixel must not move to its other side by rounding."""
    inputs, cotangent = draw(seed, masked=masked, **options)
    geometry = [options[k] for k in ("stride", "sides", "dilation", "groups", "offset_groups")]
    expected = torchs(inputs, cotangent, *geometry)
    del options["kernel_size"]
    with jax.enable_x64(True):
        found = ours(inputs, cotangent, padding=options.pop("sides"), **options)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_equals_torch_in_float32():
    options = {"stride": (1, 2), "sides": ((1, 1), (2, 0)), "dilation": (1, 2), "groups": 2}
    inputs, cotangent = draw(0, kernel_size=(3, 2), offset_groups=3, masked=True, **options)
    expected = torchs(inputs, cotangent, *options.values(), 3)
    narrow = [jnp.asarray(a, jnp.float32) for a in inputs]
    options["padding"] = options.pop("sides")
    found = ours(narrow, jnp.asarray(cotangent, jnp.float32), offset_groups=3, **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_without_offsets_it_is_a_convolution_and_vmaps():
    x = jax.random.normal(jax.random.key(0), (2, 7, 11, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    plain = convolution(x, kernel, **options)
    offsets = jnp.zeros((2, 4, 6, 1, 3, 3, 2))
    apply = jax.jit(lambda x, offsets: deformable_convolution(x, kernel, offsets, **options))
    np.testing.assert_allclose(apply(x, offsets), plain, rtol=1e-5, atol=1e-5)
    # A whole step right is the image shifted left.
    right = offsets.at[..., 1].set(1)
    shifted = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, 1:]
    expected = convolution(shifted, kernel, **options)
    found = apply(x, right)
    np.testing.assert_allclose(found[:, :, 1:], expected[:, :, 1:], rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda x, o: apply(x[None], o[None])[0])(x, right)
    np.testing.assert_allclose(mapped, found, rtol=1e-5, atol=1e-5)


def test_half_precision_keeps_the_points():
    """bfloat16 rounds 200.75 to 201, and 259 to 260: neither offsets nor places may be in it."""
    x = jnp.sin(jnp.arange(320.0)).reshape(1, 1, 320, 1).astype(jnp.bfloat16)
    kernel, offsets = jnp.ones((1, 1, 1, 1), jnp.bfloat16), jnp.zeros((1, 1, 320, 1, 1, 1, 2))
    offsets = offsets.at[0, 0, 0, ..., 1].set(200.75).at[0, 0, 259, ..., 1].set(0.25)
    out = deformable_convolution(x, kernel, offsets)
    assert out.dtype == jnp.bfloat16
    places = np.array([200.75, 259.25])
    expected = np.interp(places, np.arange(320), np.sin(np.arange(320)))
    found = out[0, 0, jnp.array([0, 259]), 0].astype(jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_offsets_of_torchvision_need_only_a_reshape():
    """Channel 2 (g KY KX + i KX + j) holds dy and the next dx, as its documentation says."""
    groups, ky, kx = 3, 2, 5
    theirs = np.arange(2 * groups * ky * kx)
    mine = theirs.reshape(groups, ky, kx, 2)
    for g, i, j in np.ndindex(groups, ky, kx):
        assert mine[g, i, j].tolist() == [2 * (g * ky * kx + i * kx + j) + part for part in (0, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 6, 5, 5)}, r"has 5 channels, but kernel .* takes 6; .* channels first"),
        ({"kernel": (3, 3, 4, 4)}, "has 6 channels, but kernel .* takes 4$"),
        ({"offsets": (1, 3, 3, 1, 3, 3, 3)}, r"offsets .* must be \(B, V, U, offset_groups"),
        ({"offsets": (1, 5, 5, 9, 2)}, r"= \(1, 3, 3, 1, 3, 3, 2\)"),
        ({"mask": (1, 3, 3, 1, 9)}, r"mask .* = \(1, 3, 3, 1, 3, 3\)"),
        ({"offset_groups": 4}, "offset_groups=4 does not divide the 6 channels"),
        ({"groups": 3, "kernel": (3, 3, 2, 4)}, "groups=3 does not divide the 4 outputs"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"padding": -1}, "padding=-1 must not be negative"),
        ({"dilation": 3}, "smaller than the window"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": (1, 5, 5, 6), "kernel": (3, 3, 6, 4), "offsets": (1, 3, 3, 1, 3, 3, 2)}
    arguments = {
        k: jnp.zeros(v) if isinstance(v, tuple) else v for k, v in (arguments | change).items()
    }
    with pytest.raises(ValueError, match=f"deformable_convolution: .*{message}"):
        deformable_convolution(**arguments)
