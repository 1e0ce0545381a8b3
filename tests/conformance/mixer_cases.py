"""The registered sequence mixers at small sizes, as the conformance suite takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.registry import module_fields

BATCH, LENGTH, WIDTH = 3, 23, 28
# Small, and such that the sequence has several blocks or windows and a rest.
SMALL = {
    "num_heads": 2,
    "head_dim": 6,
    "chunk_size": 8,
    "block_size": 8,
    "stride": 4,
    "window": 5,
    "max_length": 64,
    "rank": 7,
    "num_features": 11,
}
NAMES = jaxmodels.list_mixers()


def sizes(name):
    """What there is of the small sizes; windows only where they do not change the pattern."""
    fields = module_fields(jaxmodels.create_mixer(name))
    kept = {field: value for field, value in SMALL.items() if field in fields}
    if name != "sliding_window":
        kept.pop("window", None)
    return kept


def small(name, **overrides):
    return jaxmodels.create_mixer(name, **{**sizes(name), **overrides})


def defined(name, causal):
    """Whether a mixer has this form; what it says otherwise is tested below."""
    try:
        init = functools.partial(small(name, causal=causal).init, jax.random.key(0))
        jax.eval_shape(init, jnp.zeros((1, 2, WIDTH)))
    except ValueError:
        return False
    return True


CAUSAL = [name for name in NAMES if defined(name, True)]
BIDIRECTIONAL = [name for name in NAMES if defined(name, False)]
BOTH = [
    (name, causal) for causal, names in ((True, CAUSAL), (False, BIDIRECTIONAL)) for name in names
]
STATELESS = sorted({*NAMES} - {*CAUSAL})


@functools.cache
def inputs(length=LENGTH, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, length, WIDTH))


@functools.cache
def built(name, causal=True):
    """A mixer, parameters away from special starting values, and its compiled call."""
    mixer = small(name, causal=causal)
    params = jax.jit(mixer.init)(jax.random.key(1), inputs())
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]

    @jax.jit
    def call(params, x, segment_ids=None, state=None):
        return mixer.apply(params, x, segment_ids=segment_ids, state=state)

    return mixer, jax.tree.unflatten(structure, moved), call


def assert_close(found, wanted, tolerance=2e-5):
    """Trees of arrays; the tolerance is relative to the largest number in them.

    One scale for all, because some gradients are zero by symmetry but for rounding.
    """
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted))
    assert scale > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance),
        found,
        wanted,
    )


def segments(*lengths):
    """Ids of documents of these lengths, the same in every sequence of the batch."""
    ids = np.repeat(np.arange(len(lengths)) * 3 + 5, lengths)
    return jnp.asarray(np.broadcast_to(ids, (BATCH, len(ids))))
