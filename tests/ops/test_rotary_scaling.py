"""Stretched rotary frequencies against `transformers`, log-n against its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxmodels.ops import rotary_scaling as rs

WIDTH, BASE, TRAINED = 22, 7_919.0, 131


def theirs(kind, seq_len=None, **parameters):
    config = LlamaConfig(
        hidden_size=3 * WIDTH,
        num_attention_heads=3,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": kind, "rope_theta": BASE, **parameters},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)
    return frequencies.numpy(), factor


def same(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-6)


def test_interpolation_equals_transformers():
    expected, _ = theirs("linear", factor=5.0)
    same(rs.interpolated_frequencies(WIDTH, BASE, factor=5.0), expected)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_dynamic_ntk_equals_transformers(factor):
    lengths = np.array([7, TRAINED, TRAINED + 2, 4 * TRAINED])
    ours = jax.jit(
        lambda n: rs.dynamic_ntk_frequencies(n, WIDTH, BASE, train_length=TRAINED, factor=factor)
    )(lengths)
    for row, length in zip(ours, lengths, strict=True):
        same(row, theirs("dynamic", seq_len=int(length), factor=factor)[0])


def test_ntk_equals_dynamic_ntk_of_transformers_at_that_length():
    """At factor * TRAINED tokens, the dynamic form with factor 1 scales by just that."""
    same(rs.ntk_frequencies(WIDTH, BASE, factor=4.0), theirs("dynamic", 4 * TRAINED, factor=1.0)[0])


def test_ntk_by_definition():
    base = BASE * 6.0 ** (WIDTH / (WIDTH - 2))
    expected = [base ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]
    same(rs.ntk_frequencies(WIDTH, BASE, factor=6.0), expected)


@pytest.mark.parametrize("betas", [{}, {"beta_fast": 11.0, "beta_slow": 0.3}])
def test_yarn_equals_transformers(betas):
    expected, factor = theirs("yarn", factor=6.0, original_max_position_embeddings=TRAINED, **betas)
    same(rs.yarn_frequencies(WIDTH, BASE, factor=6.0, train_length=TRAINED, **betas), expected)
    assert rs.yarn_attention_factor(6.0) == pytest.approx(factor)
    assert rs.yarn_attention_factor(1.0) == 1.0


def test_llama3_equals_transformers():
    expected, _ = theirs(
        "llama3",
        factor=6.0,
        original_max_position_embeddings=TRAINED,
        low_freq_factor=0.7,
        high_freq_factor=3.1,
    )
    ours = rs.llama3_frequencies(
        WIDTH, BASE, factor=6.0, train_length=TRAINED, low_turns=0.7, high_turns=3.1
    )
    same(ours, expected)
    # All three ranges are there: kept, between, and interpolated.
    ratio = ours / (BASE ** (-np.arange(0, WIDTH, 2) / WIDTH))
    assert ratio[0] > 0.99 and ratio[-1] < 0.17 and ((ratio > 0.2) & (ratio < 0.9)).any()


def test_log_n_by_definition():
    positions = np.array([[0, 3, TRAINED - 1, TRAINED, 999], [5, 6, 7, 8, 10_000]])
    ours = jax.jit(lambda p: rs.log_n_scale(p, TRAINED))(positions)
    for place, scale in zip(positions.ravel(), np.ravel(ours), strict=True):
        assert scale == pytest.approx(max(1.0, math.log(place + 1, TRAINED)), rel=1e-5)


def test_bad_input():
    for name, more in (
        ("interpolated_frequencies", {}),
        ("ntk_frequencies", {}),
        ("yarn_frequencies", {"train_length": 16}),
        ("llama3_frequencies", {"train_length": 16}),
    ):
        with pytest.raises(ValueError, match=f"{name}: factor=0.5 would shorten"):
            getattr(rs, name)(8, 1e4, factor=0.5, **more)
    with pytest.raises(ValueError, match=r"dynamic_ntk_frequencies: factor=0\.5 would shorten"):
        rs.dynamic_ntk_frequencies(jnp.array([3]), 8, 1e4, train_length=16, factor=0.5)
    with pytest.raises(ValueError, match="ntk_frequencies: width=2 has no slower pair"):
        rs.ntk_frequencies(2, 1e4, factor=2.0)
    with pytest.raises(ValueError, match=r"beta_fast=1.0 must be more than beta_slow=2.0"):
        rs.yarn_frequencies(8, 1e4, factor=2.0, train_length=16, beta_fast=1.0, beta_slow=2.0)
    with pytest.raises(ValueError, match=r"high_turns=1.0 must be more than low_turns=1.0"):
        rs.llama3_frequencies(8, 1e4, factor=2.0, train_length=16, high_turns=1.0)
    with pytest.raises(ValueError, match="log_n_scale: train_length=1 must be at least 2"):
        rs.log_n_scale(jnp.array([3]), 1)
