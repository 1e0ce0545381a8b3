"""Samples of positives and negatives: exact counts, uniform chances, the same for a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxmodels.ops.box_sampling import hardest, sample_balanced, sample_rois

ANCHORS = 23
matches_of = arrays.arrays(np.int32, ANCHORS, elements=st.sampled_from([-2, -1, -1, 0, 3]))
# More than there are anchors, too.
SIZES = ((8, 0.25), (11, 0.5), (31, 0.5), (5, 1.0), (5, 0.0))


@jax.jit
def sampled(key, matches):
    return {
        size: (sample_balanced(key, matches, *size), sample_rois(key, matches, *size))
        for size in SIZES
    }


@settings(deadline=None, max_examples=60)
@given(matches=matches_of, seed=st.integers(0, 10**6))
def test_counts_are_the_papers(matches, seed):
    found = jax.device_get(sampled(jax.random.key(seed), matches))
    for (count, share), (masks, (indices, is_positive, valid)) in found.items():
        positives = min((matches >= 0).sum(), int(count * share))
        negatives = min((matches == -1).sum(), count - positives)
        positive, negative = masks
        assert (positive.sum(), negative.sum()) == (positives, negatives)
        assert (matches[positive] >= 0).all()
        assert (matches[negative] == -1).all()
        # The list is the same sample, positives first.
        assert indices.shape == is_positive.shape == valid.shape == (count,)
        assert is_positive.tolist() == [True] * positives + [False] * (count - positives)
        assert valid.sum() == positives + negatives
        assert valid[: positives + negatives].all()
        assert sorted(indices[is_positive].tolist()) == np.flatnonzero(positive).tolist()
        assert sorted(indices[valid & ~is_positive].tolist()) == np.flatnonzero(negative).tolist()
        assert ((indices >= 0) & (indices < ANCHORS)).all()


def test_every_anchor_has_the_same_chance():
    """Over 4,000 keys, within five standard deviations; and pairs are drawn together, too."""
    matches = jnp.array([0, 3, -1, -2, 0, -1, -1, 5, -1, -1, -2])
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: sample_balanced(key, matches, 6, 0.4)))
    positive, negative = (np.asarray(mask, float) for mask in draw(keys))
    for mask, among, drawn in ((positive, matches >= 0, 2), (negative, matches == -1, 4)):
        places = np.flatnonzero(among)
        chances = {1: drawn / len(places)}
        chances[2] = chances[1] * (drawn - 1) / (len(places) - 1)
        together = mask[:, places].T @ mask[:, places] / len(keys)
        for n, m in np.ndindex(together.shape):
            chance = chances[1 + (n != m)]
            assert abs(together[n, m] - chance) < 5 * np.sqrt(chance * (1 - chance) / len(keys))


def test_a_key_draws_once_and_for_all():
    matches = jnp.tile(jnp.array([-1, 0, -1]), 50)
    draw = jax.jit(lambda key: sample_rois(key, matches, 30, 0.3)[0])
    one, same, other = (draw(jax.random.key(seed)).tolist() for seed in (0, 0, 1))
    assert one == same != other


losses_of = arrays.arrays(np.float32, ANCHORS, elements=st.integers(0, 5))


@settings(deadline=None, max_examples=60)
@given(losses=losses_of, valid=arrays.arrays(bool, ANCHORS))
def test_the_hardest(losses, valid):
    there = np.flatnonzero(valid)
    for count, found in marked(losses, valid).items():
        expected = there[np.argsort(-losses[there], kind="stable")][:count]
        assert np.flatnonzero(found).tolist() == sorted(expected.tolist())


@jax.jit
def marked(losses, valid):
    return {count: hardest(losses, count, valid) for count in (1, 7, 31)}


def test_bad_input():
    matches, key = jnp.zeros(5, jnp.int32), jax.random.key(0)
    for draw in (sample_balanced, sample_rois):
        with pytest.raises(ValueError, match="sample_rois: count=0 must be at least 1"):
            draw(key, matches, 0, 0.5)
        with pytest.raises(ValueError, match=r"positive_share=1.5 in \[0, 1\]"):
            draw(key, matches, 4, 1.5)
    with pytest.raises(ValueError, match="hardest: count=0 must be at least 1"):
        hardest(jnp.zeros(5), 0, jnp.ones(5, bool))
    with pytest.raises(ValueError, match=r"hardest: valid \(3,\) must be \(A,\) = \(5,\)"):
        hardest(jnp.zeros(5), 2, jnp.ones(3, bool))
