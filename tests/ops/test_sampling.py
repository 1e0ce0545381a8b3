"""Bilinear sampling against torch's grid_sample, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops import pixel_sums
from jaxmodels.ops.sampling import bilinear_sample, grid_sample

MODES = ("zeros", "border", "reflection")
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def torchs(x, grid, cotangent, **options):
    """Values, and gradients of x and grid, in float64."""
    x = torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
    grid = torch.tensor(grid, dtype=torch.float64).requires_grad_()
    out = torch.nn.functional.grid_sample(x, grid, **options).permute(0, 2, 3, 1)
    out.backward(torch.tensor(cotangent, dtype=torch.float64))
    return out.detach(), x.grad.permute(0, 2, 3, 1), grid.grad


@jax.jit(static_argnames=("padding_mode", "align_corners"))
def ours(x, grid, cotangent, **options):
    out, pull_back = jax.vjp(lambda x, grid: grid_sample(x, grid, **options), x, grid)
    return out, *pull_back(cotangent)


def draw(rows, columns, seed=0, channels=3):
    """An image, points that reach far outside of it, and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = (2, rows, columns, channels), (2, 7, 11, 2), (2, 7, 11, channels)
    x, grid, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, grid * np.float32(2), cotangent


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 13), (1, 2)])
def test_equals_torch_in_values_and_gradients(padding_mode, align_corners, size):
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    inputs = draw(*size)
    for found, expected in zip(ours(*inputs, **options), torchs(*inputs, **options), strict=True):
        np.testing.assert_allclose(found, expected, **EXACT)


@settings(deadline=None, max_examples=25)
@given(
    padding_mode=st.sampled_from(MODES),
    align_corners=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_torch_anywhere(padding_mode, align_corners, seed):
    """In float64: where a point may lie next to a pixel, rounding moves it to the other side."""
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    inputs = [x.astype(np.float64) for x in draw(5, 13, seed)]
    with jax.enable_x64(True):
        found = ours(*inputs, **options)
    for ours_, theirs in zip(found, torchs(*inputs, **options), strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("padding_mode", "numpys"),
    [
        ("zeros", "constant"),
        ("border", "edge"),
        ("reflection", "reflect"),
        ("symmetric", "symmetric"),
    ],
)
def test_whole_points_read_what_numpy_pads(padding_mode, numpys):
    x = jax.random.normal(jax.random.key(0), (1, 5, 7, 2))
    px, py = np.meshgrid(np.arange(-13, 20), np.arange(-11, 16))
    points = jnp.asarray(np.stack([px, py], axis=-1)[None], jnp.float32)
    out = bilinear_sample(x, points, padding_mode=padding_mode)
    expected = np.pad(x, ((0, 0), (11, 11), (13, 13), (0, 0)), mode=numpys)
    np.testing.assert_allclose(out, expected, **EXACT)


def test_gradient_of_points_with_many_channels():
    """Which are summed a few vectors at a time."""
    inputs = draw(5, 13, channels=3 * pixel_sums._LANES)
    for found, expected in zip(ours(*inputs), torchs(*inputs, align_corners=False), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_gradient_of_points_of_half_precision_is_summed_in_float32():
    x, grid, cotangent = map(jnp.asarray, draw(5, 13, channels=64))
    half, came_back = x.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)

    @jax.jit
    def of_points(x):
        _, pull_back = jax.vjp(lambda grid: grid_sample(x, grid), grid)
        return pull_back(came_back.astype(x.dtype))[0]

    found, expected = of_points(half), of_points(half.astype(jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_accelerators_get_the_same_gradient(monkeypatch):
    x, grid, cotangent = map(jnp.asarray, draw(5, 13))
    of_cpu = ours(x, grid, cotangent, padding_mode="border")
    monkeypatch.setattr(pixel_sums, "platform", lambda: "gpu")

    def loss(x, grid):
        return jnp.sum(grid_sample(x, grid, padding_mode="border") * cotangent)

    again = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, grid)
    for found, expected in zip(again, of_cpu[1:], strict=True):
        np.testing.assert_allclose(found, expected, **EXACT)


def test_any_shape_of_points_and_vmap():
    x, grid, _ = map(jnp.asarray, draw(5, 13))
    sample = jax.jit(grid_sample)
    flat = sample(x, grid.reshape(2, 77, 2))
    np.testing.assert_array_equal(flat.reshape(2, 7, 11, 3), sample(x, grid))
    np.testing.assert_array_equal(sample(x, grid[:, 0, 0]), flat[:, 0])

    def loss(x, grid):
        return jnp.sin(grid_sample(x[None], grid[None])).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    mapped, alone = jax.jit(jax.vmap(gradients))(x, grid), jax.jit(gradients)
    for i in range(2):
        single = alone(x[i], grid[i])
        for found, expected in zip(mapped, single, strict=True):
            np.testing.assert_allclose(found[i], expected, **EXACT)


def test_a_scale_is_a_product_with_the_result():
    x, grid, cotangent = map(jnp.asarray, draw(5, 13))
    points, scale = 4 * grid, jax.random.normal(jax.random.key(0), (2, 7, 11))

    def inside(x, points, scale):
        return jnp.sum(cotangent * bilinear_sample(x, points, scale=scale))

    def outside(x, points, scale):
        return jnp.sum(cotangent * bilinear_sample(x, points) * scale[..., None])

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, points, scale)
        for f in (inside, outside)
    )
    for ours_, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_the_coordinates():
    """In bfloat16, 200.75 is 201; the coordinates must not be."""
    x = jnp.arange(256.0).reshape(1, 1, 256, 1).astype(jnp.bfloat16)
    points = jnp.array([[[200.75, 0.0]]])

    def read(x):
        out = bilinear_sample(x, points)
        return out.astype(jnp.float32).sum(), out

    gradient, out = jax.jit(jax.grad(read, has_aux=True))(x)
    assert out.dtype == jnp.bfloat16 and abs(float(out[0, 0, 0]) - 200.75) < 0.5
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[0, 0, 199:203, 0], jnp.array([0, 0.25, 0.75, 0]))


def test_bad_input():
    x, points = jnp.zeros((2, 5, 7, 3)), jnp.zeros((1, 4, 2))
    with pytest.raises(ValueError, match=r"bilinear_sample: points \(1, 4, 2\) .* batch size"):
        bilinear_sample(x, points)
    with pytest.raises(ValueError, match="has no pixels"):
        bilinear_sample(jnp.zeros((1, 0, 7, 3)), points)
    with pytest.raises(ValueError, match=r"bilinear_sample: scale .* one for each point"):
        bilinear_sample(x[:1], points, scale=jnp.ones((4,)))
    with pytest.raises(ValueError, match=r"unknown padding_mode 'wrap'; pass one of .*'border'"):
        bilinear_sample(x[:1], points, padding_mode="wrap")
