"""Sine and cosine positions against `diffusers` and the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

from jaxmodels.ops.positions import sincos_positions, sincos_positions_2d, sincos_timesteps


def test_square_table_equals_diffusers():
    ours = sincos_positions_2d(5, 5, 28)
    theirs = get_2d_sincos_pos_embed(28, 5, base_size=5, output_type="pt").numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert ours.dtype == jnp.float32


def test_rectangular_table_by_definition():
    rows, columns, quarter = 3, 7, 5
    table = np.asarray(sincos_positions_2d(rows, columns, 4 * quarter)).reshape(
        rows, columns, 4, -1
    )
    for y in range(rows):
        for x in range(columns):
            for i in range(quarter):
                w = 10000.0 ** (-i / quarter)
                expected = [np.sin(x * w), np.cos(x * w), np.sin(y * w), np.cos(y * w)]
                np.testing.assert_allclose(table[y, x, :, i], expected, atol=1e-6)


@pytest.mark.parametrize("width", [256, 26, 4])
def test_timesteps_equal_diffusers(width):
    t = np.array([0, 1e-3, 0.37, 17, 502.25, 999, 1000], np.float32)
    ours = jax.jit(sincos_timesteps, static_argnums=1)(jnp.asarray(t), width)
    theirs = get_timestep_embedding(torch.tensor(t), width, flip_sin_to_cos=True)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)  # sine of 1000 in float32


def test_timesteps_by_definition_in_float64():
    t, half = np.array([0.5, 3.0, 41.0], np.float32), 6
    w = 10000.0 ** (-np.arange(half) / (half - 1))
    angles = t[:, None].astype(np.float64) * w
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(sincos_timesteps(jnp.asarray(t), 2 * half), expected, atol=1e-5)
    gradient = jax.vmap(jax.grad(lambda s: sincos_timesteps(s[None], 2 * half).sum()))
    by_hand = (w * (np.cos(angles) - np.sin(angles))).sum(axis=1)
    np.testing.assert_allclose(gradient(jnp.asarray(t)), by_hand, rtol=1e-4)


def test_timesteps_stay_float32():
    """In bfloat16, 1000 and 1001 are one number; features must tell them apart all the same."""
    out = sincos_timesteps(jnp.array([1000.0, 996.0], jnp.bfloat16), 8)
    assert out.dtype == jnp.float32
    assert np.abs(out[0] - out[1]).max() > 0.1


def test_bad_widths():
    with pytest.raises(ValueError, match=r"sincos_positions_2d: width=10 .* multiple of 4"):
        sincos_positions_2d(2, 3, 10)
    for width in (7, 2):
        with pytest.raises(ValueError, match=f"sincos_timesteps: width={width} is not an even"):
            sincos_timesteps(jnp.zeros(3), width)


def test_sequence_positions_by_definition():
    positions, width = np.array([[0, 3, 4_001], [7, 7, 1]]), 10
    out = jax.jit(sincos_positions, static_argnums=1)(jnp.asarray(positions), width)
    assert out.dtype == jnp.float32
    for place in np.ndindex(2, 3):
        for i in range(width // 2):
            angle = positions[place] / 10_000.0 ** (2 * i / width)
            np.testing.assert_allclose(
                out[place][2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=5e-4
            )
    with pytest.raises(ValueError, match="sincos_positions: width=7 is not a positive even"):
        sincos_positions(jnp.zeros((1, 2)), 7)
