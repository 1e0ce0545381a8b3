"""Documents of packed sequences, against a walk from left to right."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops.segments import document_index, document_positions, document_starts


def walk(ids):
    """Start, number and position of each token, one token after the other."""
    starts, numbers, places = [], [], []
    for t, segment in enumerate(ids):
        new = t == 0 or segment != ids[t - 1]
        starts.append(new)
        numbers.append((numbers[-1] if t else -1) + new)
        places.append(0 if new else places[-1] + 1)
    return starts, numbers, places


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-1, 2), min_size=11, max_size=11))
def test_a_document_is_a_run_of_equal_ids(ids):
    """Ids come back, are negative, and mean nothing beyond being equal."""
    found = (f(jnp.asarray(ids)) for f in (document_starts, document_index, document_positions))
    for ours, theirs in zip(found, walk(ids), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_token():
    for ids in (jnp.asarray([7]), jnp.asarray([[7]])):
        np.testing.assert_array_equal(document_starts(ids), np.ones(ids.shape, bool))
        np.testing.assert_array_equal(document_index(ids), np.zeros(ids.shape))
        np.testing.assert_array_equal(document_positions(ids), np.zeros(ids.shape))


def test_leading_dimensions_are_independent_and_transforms_agree():
    ids = np.random.default_rng(0).integers(0, 2, (2, 3, 7))
    for number, function in enumerate((document_starts, document_index, document_positions)):
        wanted = np.array([[walk(row)[number] for row in rows] for rows in ids])
        np.testing.assert_array_equal(jax.jit(function)(jnp.asarray(ids)), wanted)
        np.testing.assert_array_equal(jax.vmap(function)(jnp.asarray(ids)), wanted)
