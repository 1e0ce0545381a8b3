"""Prompts laid end to end against each prompt read alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from jaxmodels.decoding import ragged
from jaxmodels.decoding.ragged import join_ragged, last_logits
from jaxmodels.models.language.decoder import Decoder

VOCAB = 37
LENGTHS = (5, 19, 1, 11, 7, 5, 2)


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length) for length in lengths]


@pytest.fixture(scope="module", params=["softmax", "gated_delta"])
def model_and_variables(request):
    options = FrozenDict(num_heads=2, head_dim=6)
    model = Decoder(
        width=12, depth=2, vocab_size=VOCAB, mixer=request.param, mixer_options=options, context=23
    )
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


def test_rows_say_where_each_prompt_is():
    joined = join_ragged([np.array([7, 8, 9]), np.array([5])], 6)
    assert joined.tokens.tolist() == [[7, 8, 9, 5, 0, 0]]
    assert joined.segment_ids.tolist() == [[1, 1, 1, 2, 0, 0]]
    assert joined.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert joined.last.tolist() == [2, 3]
    exact = join_ragged([np.array([7, 8, 9]), np.array([5])])
    assert exact.tokens.tolist() == [[7, 8, 9, 5]] and exact.segment_ids.tolist() == [[1, 1, 1, 2]]


def test_equals_each_prompt_alone(model_and_variables):
    model, variables = model_and_variables
    # A recurrence of one length serves all prompts: what follows a token does not reach back.
    longest = max(LENGTHS)
    tokens = np.stack([np.pad(p, (0, longest - len(p))) for p in prompts()])
    alone, _ = jax.jit(model.apply)(variables, tokens)
    want = np.asarray(alone)[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1]
    # Several rows, rows as long as the longest prompt, and all in one that is not full.
    for capacity in (23, 19, 2048):
        found = last_logits(model, variables, prompts(), capacity=capacity)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_other_prompts_use_the_same_program(model_and_variables):
    model, variables = model_and_variables
    # A length of row of this test's own. Four prompts share one, then three, then two or three.
    last_logits(model, variables, prompts((5, 5, 5, 5, 20)), capacity=22)
    compiled = ragged._read._cache_size()
    for lengths in ((7, 7, 7, 18), (20, 2, 7, 9, 11, 4, 18, 13, 6, 3, 1)):
        last_logits(model, variables, prompts(lengths), capacity=22)
    assert ragged._read._cache_size() == compiled


def test_bad_prompts_are_named(model_and_variables):
    model, variables = model_and_variables
    for wrong, message in (
        ([], "prompts is empty"),
        ([[1], []], r"prompts\[1\] is empty"),
        ([[[1]]], r"prompts\[0\] has shape \(1, 1\)"),
        ([[1.0]], r"prompts\[0\] is of float64, not integers"),
        ([[1] * 24], r"prompts\[0\] has 24 tokens, more than capacity=30 or .* context=23"),
        ([[1, VOCAB]], rf"prompts\[0\] holds the token {VOCAB}, outside \[0, vocab_"),
        ([[-1]], r"prompts\[0\] holds the token -1"),
    ):
        with pytest.raises(ValueError, match=f"last_logits: {message}"):
            last_logits(model, variables, wrong, capacity=30)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 8 tokens, more than capacity=7 or"):
        last_logits(model, variables, [[1] * 8], capacity=7)
