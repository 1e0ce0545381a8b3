"""Rotary positions against `transformers` and the definition in complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2VLTextConfig
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    Qwen2VLVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)

from jaxmodels.ops.rotary import (
    axial_angles,
    multimodal_angles,
    rotary_angles,
    rotary_frequencies,
    rotate,
    xpos_scales,
)

B, T, H, K = 2, 5, 3, 14


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def places(seed, *shape, high=97):
    return np.random.default_rng(seed).integers(0, high, shape)


def heads_first(x):
    return torch.tensor(x).transpose(1, 2)


def by_complex_numbers(x, angles, layout, magnitude=1.0):
    """Pairs of channels as complex numbers, turned by multiplication, in float64."""
    n, x = angles.shape[-1], x.astype(np.float64)
    a, b = (
        (x[..., :n], x[..., n : 2 * n])
        if layout == "half"
        else (x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2])
    )
    z = (a + 1j * b) * magnitude * np.exp(1j * angles[..., None, :].astype(np.float64))
    out = x.copy()
    if layout == "half":
        out[..., :n], out[..., n : 2 * n] = z.real, z.imag
    else:
        out[..., : 2 * n : 2], out[..., 1 : 2 * n : 2] = z.real, z.imag
    return out


def test_half_split_layout_equals_llama():
    x, positions = normal(0, B, T, H, K), places(1, B, T)
    config = LlamaConfig(
        hidden_size=H * K,
        num_attention_heads=H,
        rope_parameters={"rope_type": "default", "rope_theta": 523.0},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.tensor(x), torch.tensor(positions))
    expected, _ = llama_rotary(heads_first(x), heads_first(x), cos, sin)
    angles = rotary_angles(jnp.asarray(positions), rotary_frequencies(K, 523.0))
    ours = jax.jit(rotate)(jnp.asarray(x), angles)
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), rtol=1e-4, atol=1e-4)


def test_interleaved_layout_equals_gptj():
    x, positions = normal(0, B, T, H, K), places(1, B, T)
    angles = np.asarray(rotary_angles(jnp.asarray(positions), rotary_frequencies(K)))
    wave = torch.tensor(angles)
    expected = gptj_rotary(torch.tensor(x), wave.sin(), wave.cos())
    ours = rotate(jnp.asarray(x), jnp.asarray(angles), layout="interleaved")
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_partial_rotary_equals_neox():
    x, positions = normal(0, B, T, H, K), places(1, B, T)
    angles = rotary_angles(jnp.asarray(positions), rotary_frequencies(6))
    wave = torch.tensor(np.concatenate([angles, angles], axis=-1))
    expected, _ = neox_rotary(heads_first(x), heads_first(x), wave.cos(), wave.sin())
    ours = rotate(jnp.asarray(x), angles)
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours[..., 6:], x[..., 6:])


def test_axial_angles_equal_the_vision_tower_of_qwen2_vl():
    head_dim, x = 12, normal(0, 7, H, 12)
    positions = places(1, 7, 2, high=11)
    config = Qwen2VLVisionConfig(embed_dim=H * head_dim, num_heads=H)
    theirs = Qwen2VLVisionRotaryEmbedding(config)
    cos, sin = theirs(torch.tensor(x), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb_vision(torch.tensor(x), torch.tensor(x), cos, sin)
    angles = axial_angles(jnp.asarray(positions), rotary_frequencies(head_dim // 2))
    ours = rotate(jnp.asarray(x), angles)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_multimodal_angles_equal_qwen2_vl():
    x, positions, sections = normal(0, B, T, H, K), places(1, B, T, 3), (1, 4, 2)
    config = Qwen2VLTextConfig(
        hidden_size=H * K,
        num_attention_heads=H,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
    )
    theirs = Qwen2VLRotaryEmbedding(config)
    cos, sin = theirs(torch.tensor(x), torch.tensor(positions).permute(2, 0, 1))
    expected, _ = llama_rotary(heads_first(x), heads_first(x), cos, sin)
    angles = multimodal_angles(jnp.asarray(positions), rotary_frequencies(K), sections)
    ours = rotate(jnp.asarray(x), angles)
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_values_and_gradients_by_complex_numbers(layout):
    x, d_out, angles = normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, 5)
    magnitude = np.exp(normal(3, B, T, 5))
    fade, turns = jnp.asarray(magnitude), jnp.asarray(angles)
    turn = jax.jit(lambda x: rotate(x, turns, layout=layout, magnitude=fade))
    out, pull = jax.vjp(turn, jnp.asarray(x))
    by_hand = by_complex_numbers(x, angles, layout, magnitude[..., None, :])
    np.testing.assert_allclose(out, by_hand, rtol=1e-5, atol=1e-5)
    # The transpose of a rotation turns back.
    back = by_complex_numbers(d_out, -angles, layout, magnitude[..., None, :])
    np.testing.assert_allclose(pull(jnp.asarray(d_out))[0], back, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.vmap(rotate)(x, turns), rotate(jnp.asarray(x), turns))


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 500),
    n=st.integers(0, 500),
    shift=st.integers(-300, 300),
    layout=st.sampled_from(["half", "interleaved"]),
)
def test_products_depend_on_the_distance_alone(m, n, shift, layout):
    q, k = normal(0, 1, 1, 1, K), normal(1, 1, 1, 1, K)
    frequencies = rotary_frequencies(K)

    def product(m, n):
        turned = [
            rotate(
                jnp.asarray(x), rotary_angles(jnp.full((1, 1), place), frequencies), layout=layout
            )
            for x, place in ((q, m), (k, n))
        ]
        return float(jnp.vdot(*turned))

    assert product(m + shift, n + shift) == pytest.approx(product(m, n), abs=2e-3)


def test_xpos_products_by_definition():
    q, k, m, n, base = normal(0, 1, T, H, K), normal(1, 1, T, H, K), 61, 17, 37.0
    frequencies = rotary_frequencies(K)

    def turned(x, place, sign):
        positions = jnp.full((1, T), place)
        fade = xpos_scales(sign * positions, K, scale_base=base)
        angles = rotary_angles(positions, frequencies)
        return rotate(jnp.asarray(x), angles, layout="interleaved", magnitude=fade)

    ours = np.einsum("bthk,bthk->bth", turned(q, m, 1), turned(k, n, -1))
    expected = np.zeros((1, T, H))
    for i in range(K // 2):
        zeta = (2 * i / K + 0.4) / 1.4
        a, b = (x[..., 2 * i].astype(complex) + 1j * x[..., 2 * i + 1] for x in (q, k))
        wave = np.exp(1j * (m - n) * 10_000.0 ** (-2 * i / K))
        expected += (a * np.conj(b) * wave).real * zeta ** ((m - n) / base)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_frequencies_by_definition():
    expected = [523.0 ** (-2 * i / K) for i in range(K // 2)]
    np.testing.assert_allclose(rotary_frequencies(K, 523.0), expected, rtol=1e-6)


def test_half_precision_keeps_its_dtype_and_turns_in_float32():
    x = jnp.ones((1, 1, 1, K), jnp.bfloat16)
    angles = rotary_angles(jnp.array([[4093]]), rotary_frequencies(K))
    out = rotate(x, angles)
    assert out.dtype == jnp.bfloat16
    expected = by_complex_numbers(np.ones((1, 1, 1, K)), np.asarray(angles), "half")
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=8e-3)


def test_bad_input():
    with pytest.raises(ValueError, match="rotary_frequencies: width=7 cannot be split"):
        rotary_frequencies(7)
    with pytest.raises(ValueError, match=r"rotary_frequencies: base=0\.0 must be positive"):
        rotary_frequencies(8, 0.0)
    with pytest.raises(ValueError, match="rotate: layout='pairs' is none of"):
        rotate(jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 2)), layout="pairs")
    with pytest.raises(ValueError, match=r"rotate: 3 angles turn 6 channels, and x .* has only 4"):
        rotate(jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 3)))
    with pytest.raises(ValueError, match=r"multimodal_angles: sections=\(1, 2\) must be one"):
        multimodal_angles(jnp.ones((5, 3)), jnp.ones(3), (1, 2))
