"""The layer that moves its taps, against torch and against the plain convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.deformable import DeformableConv


def random_like(params, scale=0.3):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


def torchs(x, params, offset_groups, modulated):
    """Offsets and masks in the order of torchvision's channels: all offsets, then all masks."""
    as_torch = lambda a: torch.tensor(np.asarray(a), dtype=torch.float64)  # noqa: E731
    conv = lambda a, p: functional.conv2d(  # noqa: E731
        a, as_torch(p["kernel"]).permute(3, 2, 0, 1), as_torch(p["bias"]), padding=1
    )
    x = as_torch(x).permute(0, 3, 1, 2)
    batch, _, rows, columns = x.shape
    made = conv(x, params["offsets"])
    offsets = made[:, : 18 * offset_groups].reshape(batch, offset_groups, 9, 2, rows, columns)
    masks = torch.ones(batch, offset_groups, 9, rows, columns, dtype=x.dtype)
    if modulated:
        masks = torch.sigmoid(made[:, 18 * offset_groups :]).reshape(masks.shape)
    out = as_torch(params["bias"])[None, :, None, None]
    for k in range(9):
        parts = []
        for g, part in enumerate(x.chunk(offset_groups, dim=1)):
            y = torch.arange(rows)[:, None] + k // 3 - 1 + offsets[:, g, k, 0]
            z = torch.arange(columns)[None, :] + k % 3 - 1 + offsets[:, g, k, 1]
            grid = torch.stack([2 * z / (columns - 1) - 1, 2 * y / (rows - 1) - 1], dim=-1)
            parts.append(
                functional.grid_sample(part, grid, align_corners=True) * masks[:, g, k, None]
            )
        weight = as_torch(params["kernel"])[k // 3, k % 3].T[:, :, None, None]
        out = out + functional.conv2d(torch.cat(parts, dim=1), weight)
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("modulated", [True, False])
def test_equals_torch(modulated):
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 6))
    layer = DeformableConv(4, 3, offset_groups=2, modulated=modulated)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = random_like(shapes)
    out = jax.jit(layer.apply)({"params": params}, x)
    expected = torchs(x, params, 2, modulated)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("modulated", "share"), [(True, 0.5), (False, 1.0)])
def test_starts_as_a_plain_convolution(modulated, share):
    x = jax.random.normal(jax.random.key(0), (2, 11, 13, 6))
    geometry = {"stride": (1, 2), "dilation": (2, 1), "groups": 2, "use_bias": False}
    layer = DeformableConv(4, (3, 5), **geometry, modulated=modulated)
    out, variables = jax.jit(layer.init_with_output)(jax.random.key(1), x)
    params = variables["params"]
    assert set(params) == {"kernel", "offsets"}
    plain = Conv(4, (3, 5), **geometry).apply({"params": {"kernel": params["kernel"]}}, x)
    np.testing.assert_allclose(out, share * plain, rtol=1e-5, atol=1e-5)


def test_all_parameters_learn_from_the_start():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 6))
    layer = DeformableConv(4, 3)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    gradients = jax.jit(jax.grad(lambda p: jnp.square(layer.apply(p, x)).sum()))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, path


def test_computes_in_its_dtype():
    x = jax.random.normal(jax.random.key(0), (1, 5, 7, 6))
    layer = DeformableConv(4, 3, dtype=jnp.bfloat16)
    out, variables = jax.jit(layer.init_with_output)(jax.random.key(1), x)
    assert out.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_bad_input():
    x = jnp.zeros((1, 5, 7, 6))
    with pytest.raises(ValueError, match="DeformableConv: groups=4 does not divide the 6"):
        DeformableConv(4, 3, groups=4).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="offset_groups=4 does not divide the 6 channels"):
        DeformableConv(4, 3, offset_groups=4).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="DeformableConv: kernel_size=0"):
        DeformableConv(4, 0).init(jax.random.key(0), x)
