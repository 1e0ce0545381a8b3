"""Caches shortened, given a tree and left with a path, against sequences run without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.layers.mixers.cache import KVCache, keep_path, shorten, tokens_seen
from jaxmodels.registry import create_mixer

BATCH, WIDTH, ROOM = 3, 14, 17
# A root, two children of it, and two and one children of these.
PARENTS = (-1, 0, 0, 1, 1, 2)
DEPTHS = (0, 1, 1, 2, 2, 2)
OPTIONS = {
    "softmax": {"num_heads": 2, "head_dim": 6},
    "gau": {"head_dim": 6, "value_dim": 11},
}


def built(name):
    mixer = create_mixer(name, **OPTIONS[name])
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.ones((1, 2, WIDTH)))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    return mixer, jax.jit(lambda x, **rest: mixer.apply(params, x, **rest))


def tokens(count, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, count, WIDTH))


def line(node):
    return [node] if PARENTS[node] < 0 else [*line(PARENTS[node]), node]


def among():
    return jnp.array([[j in line(i) for j in range(6)] for i in range(6)])


def after(name, count, **ids):
    """A mixer, its call, `count` tokens and the state after them."""
    mixer, call = built(name)
    x = tokens(count)
    return call, x, call(x, state=mixer.init_state(BATCH, ROOM, jnp.float32), **ids)[1]


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("length", [1, 5])
def test_what_a_shorter_cache_has_seen(name, length):
    call, x, state = after(name, 7)
    # As traced numbers, as a loop would have them.
    state = jax.jit(shorten)(state, length)
    assert int(state.length) == length
    np.testing.assert_array_equal(tokens_seen(state), length)
    new = tokens(4, seed=2)
    found, state = call(new, state=state)
    wanted, _ = call(jnp.concatenate([x[:, :length], new], axis=1))
    close(found, wanted[:, length:])
    np.testing.assert_array_equal(tokens_seen(state), length + 4)


def test_earlier_documents_stay_unseen_in_a_shorter_cache():
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * BATCH)
    call, x, state = after("softmax", 7, segment_ids=ids)
    new = tokens(2, seed=2)
    found, _ = call(new, state=shorten(state, 5))
    wanted, _ = call(jnp.concatenate([x[:, 3:5], new], axis=1))
    close(found, wanted[:, 2:])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tree_is_its_paths_one_at_a_time(name):
    call, x, state = after(name, 5)
    nodes = tokens(6, seed=2)
    found, new = call(
        nodes,
        positions=jnp.broadcast_to(5 + jnp.array(DEPTHS), (BATCH, 6)),
        state=state._replace(among=among()),
    )
    assert new.among is None and int(new.length) == 11
    for node in range(6):
        path = jnp.concatenate([x, nodes[:, line(node)]], axis=1)
        close(found[:, node], call(path)[0][:, -1])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_kept_path_is_all_that_was_seen(name, count):
    call, x, state = after(name, 5)
    nodes = tokens(6, seed=2)
    places = jnp.broadcast_to(5 + jnp.array(DEPTHS), (BATCH, 6))
    _, state = call(nodes, positions=places, state=state._replace(among=among()))
    # Each sequence of the batch goes its own way; what is not kept is any number.
    paths = jnp.array([[0, 2, 5], [0, 1, 4], [0, 1, 3]])
    state = jax.jit(keep_path)(state, 5, paths, count)
    np.testing.assert_array_equal(tokens_seen(state), 5 + count)
    new = tokens(2, seed=3)
    found, _ = call(new, state=state)
    kept = jnp.take_along_axis(nodes, paths[:, :count, None], axis=1)
    wanted, _ = call(jnp.concatenate([x, kept, new], axis=1))
    close(found, wanted[:, -2:])


def test_alternatives_need_no_first_token_in_common():
    call, x, state = after("softmax", 5)
    nodes = tokens(2, seed=2)
    places = jnp.full((BATCH, 2), 5)
    found, _ = call(nodes, positions=places, state=state._replace(among=jnp.eye(2, dtype=bool)))
    for node in range(2):
        wanted, _ = call(jnp.concatenate([x, nodes[:, node : node + 1]], axis=1))
        close(found[:, node], wanted[:, -1])


def test_alternatives_belong_to_documents_as_all_tokens_do():
    """Padding to the left of the prompt is no more visible to a tree than to a chain."""
    mixer, call = built("softmax")
    x, nodes = tokens(5), tokens(6, seed=2)
    ids = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    _, state = call(x, state=mixer.init_state(BATCH, ROOM, jnp.float32), segment_ids=ids)
    seen = jnp.array([3, 5, 4])
    np.testing.assert_array_equal(tokens_seen(state), seen)
    places = seen[:, None] + jnp.array(DEPTHS)[None]
    found, _ = call(nodes, positions=places, state=state._replace(among=among()))
    for row in range(BATCH):
        own = jnp.concatenate([x[:, 5 - seen[row] :], nodes[:, line(4)]], axis=1)
        close(found[row, 4], call(own)[0][row, -1])


def test_bad_input():
    call, _, state = after("softmax", 5)
    assert isinstance(state, KVCache)
    message = r"SoftmaxMixer: the state's among \(6, 6\) must be \(T, T\) = \(2, 2\)"
    with pytest.raises(ValueError, match=message):
        call(tokens(2), state=state._replace(among=among()))
    mixer = create_mixer("sparse", num_heads=2, head_dim=6)
    state = mixer.init_state(BATCH, ROOM, jnp.float32)
    params = jax.jit(mixer.init)(jax.random.key(0), tokens(2))
    with pytest.raises(ValueError, match=r"SparseMixer: a tree .* draft chains"):
        mixer.apply(params, tokens(6), state=state._replace(among=among()))
