"""Filters of the next token's logits against the logits processors of `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxmodels.ops.logit_filters import (
    apply_filters,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    scale_by_temperature,
)

BATCH, VOCAB = 5, 53


def random_logits(seed=0, spread=3.0):
    return (spread * np.random.default_rng(seed).normal(size=(BATCH, VOCAB))).astype(np.float32)


def theirs(logits, *processors, tokens=None):
    scores = torch.tensor(logits)
    for process in processors:
        scores = process(tokens, scores)
    return scores.numpy()


def assert_same(ours, wanted):
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(wanted))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)


CASES = {
    "temperature": (lambda x: scale_by_temperature(x, 0.37), TemperatureLogitsWarper(0.37)),
    "top_k": (lambda x: keep_top_k(x, 7), TopKLogitsWarper(7)),
    "top_k of 1": (lambda x: keep_top_k(x, 1), TopKLogitsWarper(1)),
    "top_k of all": (lambda x: keep_top_k(x, VOCAB + 8), TopKLogitsWarper(VOCAB + 8)),
    "top_p": (lambda x: keep_top_p(x, 0.83), TopPLogitsWarper(0.83)),
    "tiny top_p": (lambda x: keep_top_p(x, 1e-9), TopPLogitsWarper(1e-9)),
    "top_p of 1": (lambda x: keep_top_p(x, 1.0), TopPLogitsWarper(1.0)),
    "min_p": (lambda x: keep_min_p(x, 0.11), MinPLogitsWarper(0.11)),
    "min_p of 0": (lambda x: keep_min_p(x, 0), MinPLogitsWarper(0.0)),
    "min_p of 1": (lambda x: keep_min_p(x, 1), MinPLogitsWarper(1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    ours, processor = CASES[case]
    logits = random_logits()
    assert_same(jax.jit(ours)(logits), theirs(logits, processor))
    one = ours(jnp.asarray(logits[2]))
    assert_same(one, theirs(logits, processor)[2])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.25, 4.0),
    k=st.integers(1, VOCAB),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_all_filters_in_the_order_of_transformers(seed, temperature, k, top_p, min_p):
    logits = random_logits(seed)
    ours = apply_filters(
        jnp.asarray(logits), temperature=temperature, top_k=k, top_p=top_p, min_p=min_p
    )
    wanted = theirs(
        logits,
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    )
    # Where a token lies at the very border, rounding may decide otherwise.
    assert np.sum(np.isinf(ours) != np.isinf(wanted)) <= 1
    both = np.isfinite(ours) & np.isfinite(wanted)
    np.testing.assert_allclose(ours[both], wanted[both], rtol=1e-6)


def test_nothing_asked_changes_nothing():
    logits = jnp.asarray(random_logits())
    np.testing.assert_array_equal(apply_filters(logits), logits)


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_repetition_penalty_equals_transformers(penalty):
    logits = random_logits(1)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (BATCH, 11))
    seen = np.zeros((BATCH, VOCAB), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    wanted = theirs(logits, RepetitionPenaltyLogitsProcessor(penalty), tokens=torch.tensor(tokens))
    assert_same(penalize_repetition(jnp.asarray(logits), jnp.asarray(seen), penalty), wanted)


def test_equal_logits_stay_together():
    logits = jnp.array([2.0, 1.0, 1.0, 0.0])
    for kept in (keep_top_k(logits, 2), keep_top_p(logits, 0.7), keep_min_p(logits, 0.3)):
        np.testing.assert_array_equal(kept, [2, 1, 1, -np.inf])


def test_tokens_ruled_out_before_stay_out():
    logits = jnp.array([0.5, -jnp.inf, 0.0, -jnp.inf])
    for kept in (keep_top_k(logits, 3), keep_top_p(logits, 1.0), keep_min_p(logits, 0)):
        np.testing.assert_array_equal(kept, logits)


def test_small_probabilities_are_not_lost_in_the_sum():
    """A thousand tokens that one float32 sum from above would round away."""
    logits = np.concatenate([[0.0], np.full(1000, np.log(2e-8))]).astype(np.float32)
    kept = keep_top_p(jnp.asarray(logits), 1.0)
    assert np.isfinite(kept).all()


def test_numbers_may_be_traced_and_halves_stay_halves():
    logits = jnp.asarray(random_logits(), jnp.bfloat16)
    calls = 0

    @jax.jit
    def filtered(logits, temperature, top_p, min_p, penalty):
        nonlocal calls
        calls += 1
        logits = penalize_repetition(logits, logits > 1, penalty)
        return apply_filters(logits, temperature=temperature, top_k=9, top_p=top_p, min_p=min_p)

    for scale in (0.5, 0.25):
        numbers = [jnp.float32(x * scale) for x in (2.0, 1.0, 0.1, 3.0)]
        assert filtered(logits, *numbers).dtype == jnp.bfloat16
    assert calls == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: scale_by_temperature(x, 0.0), "temperature holds 0, outside"),
        (lambda x: apply_filters(x, temperature=-1), "temperature holds -1, outside"),
        (lambda x: keep_top_k(x, 0), "keep_top_k: k=0 leaves no token"),
        (lambda x: keep_top_p(x, 0), r"keep_top_p: p holds 0, outside \(0, 1\]"),
        (lambda x: apply_filters(x, top_p=1.5), r"keep_top_p: p holds 1.5, outside \(0, 1\]"),
        (lambda x: keep_min_p(x, -0.1), r"keep_min_p: p holds -0.1, outside \[0, 1\]"),
        (lambda x: penalize_repetition(x, x > 0, 0.0), "penalty holds 0, outside"),
        (lambda x: penalize_repetition(x, x[:2] > 0, 2.0), r"seen \(2, 53\) must have the shape"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.asarray(random_logits()))
