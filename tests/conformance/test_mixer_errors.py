"""What every registered sequence mixer says of bad input: its name, the argument, a remedy."""

import contextlib

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from conformance.mixer_cases import (
    BATCH,
    BIDIRECTIONAL,
    BOTH,
    CAUSAL,
    LENGTH,
    NAMES,
    STATELESS,
    built,
    inputs,
    small,
)

from jaxmodels.registry import module_fields


@contextlib.contextmanager
def as_users_run():
    """Without the suite's checks of annotations, which would speak before the mixer does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def refused(name, match, *args, causal=True, **kwargs):
    mixer, params, _ = built(name, causal)
    with as_users_run(), pytest.raises(ValueError, match=match) as caught:
        mixer.apply(params, *args, **kwargs)
    assert type(mixer).__name__ in str(caught.value)


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_bad_input_is_named(name, causal):
    x = inputs()
    refused(name, r"x \(28,\) must be \(B, T, D\)", x[0, 0], causal=causal)
    wrong = jnp.zeros((BATCH, LENGTH + 1), jnp.int32)
    refused(name, r"positions \(3, 24\) must be \(B, T\) = \(3, 23\)", x, wrong, causal=causal)
    refused(name, r"segment_ids \(3, 24\) must be", x, segment_ids=wrong, causal=causal)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_bad_state_is_named(name):
    mixer, _, _ = built(name)
    other = mixer.init_state(BATCH + 2, LENGTH, jnp.float32)
    refused(name, "another batch", inputs(), state=other)
    refused(name, "init_state", inputs(), state=(jnp.zeros(3),))
    if name in BIDIRECTIONAL:
        state = mixer.init_state(BATCH, LENGTH, jnp.float32)
        refused(name, "causal=False contradicts", inputs(), state=state, causal=False)


@pytest.mark.parametrize("name", STATELESS)
def test_without_a_causal_form_there_is_no_state(name):
    with pytest.raises(ValueError, match="causal=True is not defined"):
        small(name, causal=True).init(jax.random.key(0), inputs())
    with pytest.raises(ValueError, match="init_state"):
        small(name).init_state(BATCH, LENGTH, jnp.float32)


@pytest.mark.parametrize("name", CAUSAL)
def test_past_max_length_or_constant_state(name):
    """A state either has room for max_length tokens and says so, or does not grow."""
    mixer, params, call = built(name)
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(mixer.init_state(1, n, jnp.float32)))
        for n in (LENGTH, 16_384)
    ]
    if counts[0] == counts[1]:
        return
    state = mixer.init_state(BATCH, LENGTH - 1, jnp.float32)
    refused(name, "exceed its max_length=22", inputs(), state=state)
    _, state = mixer.apply(params, inputs()[:, :20], state=state)
    refused(name, "exceed its max_length=22", inputs()[:, 20:], state=state)
    # Inside a compiled program the length is not known: no number may look right.
    assert jnp.isnan(call(params, inputs()[:, 20:], state=state)[0]).all()


@pytest.mark.parametrize("name", [n for n in NAMES if "chunk_size" in module_fields(small(n))])
def test_a_chunk_size_of_nothing_is_named(name):
    with pytest.raises(ValueError, match="chunk_size=0"):
        small(name, chunk_size=0).init(jax.random.key(0), inputs())


@pytest.mark.parametrize("name", [n for n in NAMES if "form" in module_fields(small(n))])
def test_an_unknown_form_is_named(name):
    with pytest.raises(ValueError, match=r"form='chunky'.*recurrent"):
        small(name, form="chunky").init(jax.random.key(0), inputs())
