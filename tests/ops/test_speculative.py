"""Rules of acceptance: distributions by chi-squared, paths against a walk in plain Python."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmodels.ops.candidate_tree import CandidateTree, chain
from jaxmodels.ops.speculative import accept_drawn, accept_drawn_tree, accept_equal, accept_typical

DRAWS, VOCABULARY, ROOT = 50_000, 7, 3
TREE = CandidateTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (0, 1, 0)))


def markov(seed, zeros=False):
    """Row after row, what follows a token; with impossible tokens if so asked."""
    rng = np.random.default_rng(seed)
    table = rng.gamma(0.7, size=(VOCABULARY, VOCABULARY))
    if zeros:
        table[rng.random(table.shape) < 0.3] = 0
        table[:, 5] += 0.2
    return table / table.sum(axis=1, keepdims=True)


# Tokens that only the one or only the other can say are the cases that go wrong.
MODEL, DRAFT = markov(0, zeros=True), markov(1, zeros=True)


def draw(key, table):
    return jax.random.categorical(key, jnp.log(jnp.asarray(table, jnp.float32)))


def pvalue(tokens, expected):
    """Of a chi-squared test; what is impossible must not have come."""
    counts = np.bincount(np.asarray(tokens), minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    return stats.chisquare(counts[expected > 0], counts.sum() * expected[expected > 0]).pvalue


def check_follows_the_model(accepted):
    """Every token is distributed as the model says, given the one before it."""
    tokens, count = (np.asarray(x) for x in (accepted.tokens, accepted.count))
    before = np.full(DRAWS, ROOT)
    for place in range(tokens.shape[1]):
        there = count >= place
        for token in range(VOCABULARY):
            now = tokens[there & (before == token), place]
            if len(now) > 2000:
                assert pvalue(now, MODEL[token]) > 0.01, (place, token)
        before = tokens[:, place]
    assert (count == tokens.shape[1] - 1).sum() > 100


def chain_of_draws(length=3):
    key, guesses = jax.random.key(2), []
    before = jnp.full(DRAWS, ROOT)
    for place in range(length):
        before = draw(jax.random.fold_in(key, place), DRAFT[before])
        guesses.append(before)
    guesses = jnp.stack(guesses, axis=1)
    inputs = jnp.pad(guesses, ((0, 0), (1, 0)), constant_values=ROOT)
    return guesses, *(jnp.asarray(t[x], jnp.float32) for t, x in ((DRAFT, inputs), (MODEL, inputs)))


@pytest.mark.parametrize("length", [1, 3])
def test_a_drawn_chain_follows_the_model(length):
    """Of one guess too, after which the model's own token often comes."""
    guesses, drafted, probabilities = chain_of_draws(length)
    accept = jax.jit(accept_drawn)
    accepted = accept(jax.random.key(5), guesses, drafted[:, :length], probabilities)
    check_follows_the_model(accepted)
    # Leviathan et al. 2023, theorem 3.5: as often as the two distributions overlap.
    overlap = np.minimum(MODEL[ROOT], DRAFT[ROOT]).sum()
    assert abs(np.mean(accepted.count > 0) - overlap) < 0.01
    for place in range(length):
        kept = accepted.count > place
        np.testing.assert_array_equal(accepted.tokens[kept, place], guesses[kept, place])
    np.testing.assert_array_equal(accepted.path[7], np.arange(length + 1))


def test_a_draft_that_is_the_model_is_always_right():
    guesses, _, probabilities = chain_of_draws()
    # What the model itself might have drawn, whatever it was in truth.
    possible = probabilities.clip(1e-3)
    accepted = accept_drawn(jax.random.key(5), guesses, possible[:, :3], possible)
    assert (np.asarray(accepted.count) == 3).all()


def tree_of_draws(replacing):
    """Guesses after every node; without putting back, ranks are drawn one after the other."""
    key = jax.random.key(3)
    tokens = [jnp.full(DRAWS, ROOT)]
    drafted = []
    for node in range(1, len(TREE)):
        q = DRAFT[np.asarray(tokens[TREE.parents[node]])]
        for other in range(1, node):
            if not replacing and TREE.parents[other] == TREE.parents[node]:
                q = q.copy()
                q[np.arange(DRAWS), np.asarray(tokens[other])] = 0
        # Where nothing is left to draw, anything may be guessed.
        q = np.where(q.sum(1, keepdims=True) > 0, q, 1)
        q = q / q.sum(axis=1, keepdims=True)
        tokens.append(draw(jax.random.fold_in(key, node), q))
        drafted.append(q)
    inputs = np.stack(tokens, axis=1)
    found = inputs[:, 1:], np.stack(drafted, axis=1), MODEL[inputs]
    return jax.tree.map(lambda x: jnp.asarray(x, np.result_type(x.dtype.kind + "4")), found)


@pytest.mark.parametrize("replacing", [True, False])
def test_a_drawn_tree_follows_the_model(replacing):
    guesses, drafted, probabilities = tree_of_draws(replacing)
    accept = jax.jit(functools.partial(accept_drawn_tree, tree=TREE))
    accepted = accept(
        jax.random.key(5), guesses=guesses, drafted=drafted, probabilities=probabilities
    )
    check_follows_the_model(accepted)
    first = np.mean(np.asarray(accepted.path[:, 1]) == 1)
    overlap = np.minimum(MODEL[ROOT], DRAFT[ROOT]).sum()
    assert abs(first - overlap) < 0.01
    # Second and third guesses of a token are accepted too, along a line of the tree.
    assert np.mean(accepted.count > 0) > first + 0.05
    check_paths(accepted, guesses)


def test_a_chain_is_a_tree():
    guesses, drafted, probabilities = chain_of_draws()
    accepted = jax.jit(functools.partial(accept_drawn_tree, tree=chain(3)))(
        jax.random.key(6), guesses=guesses, drafted=drafted[:, :3], probabilities=probabilities
    )
    check_follows_the_model(accepted)


def check_paths(accepted, guesses):
    """A path goes from the root from node to node, and has the tokens of its nodes."""
    for row in range(500):
        path, count = np.asarray(accepted.path[row]), int(accepted.count[row])
        assert path[0] == 0
        for place in range(count):
            node = path[place + 1]
            assert TREE.parents[node] == path[place]
            assert accepted.tokens[row, place] == guesses[row, node - 1]


def random_tree(rows, seed=4):
    """Guesses that differ among siblings, and what the model says after every node."""
    rng = np.random.default_rng(seed)
    width = TREE.ranks.max() + 1
    sets = np.stack([[rng.permutation(4)[:width] for _ in range(TREE.depth)] for _ in range(rows)])
    guesses = sets[:, TREE.depths[1:] - 1, TREE.ranks[1:]]
    probabilities = rng.dirichlet(np.full(4, 0.5), size=(rows, len(TREE))).astype(np.float32)
    own = rng.integers(0, 4, size=(rows, len(TREE)))
    return jnp.asarray(guesses), jnp.asarray(probabilities), jnp.asarray(own)


def walk(passes, row, node=0):
    """The longest way on from a node, by trying all."""
    ways = [
        walk(passes, row, child)
        for child in range(1, len(TREE))
        if TREE.parents[child] == node and passes(row, node, child)
    ]
    return [node, *max(ways, key=len, default=[])]


def check_walks(accepted, guesses, own, passes):
    lengths = set()
    for row in range(len(guesses)):
        path = walk(passes, row)
        count = int(accepted.count[row])
        assert count == len(path) - 1
        found = np.asarray(accepted.path[row, : count + 1])
        # Of several longest paths any will do; that it is one is checked here.
        assert all(passes(row, a, b) for a, b in itertools.pairwise(found))
        wanted = [*guesses[row, found[1:] - 1], own[row, found[-1]]]
        np.testing.assert_array_equal(accepted.tokens[row, : count + 1], wanted)
        lengths.add(count)
    assert lengths == {0, 1, 2, 3}
    check_paths(accepted, guesses)


def test_equal_guesses_are_walked():
    guesses, _, own = random_tree(500)
    accepted = jax.jit(functools.partial(accept_equal, TREE))(guesses, own)
    guesses, own = np.asarray(guesses), np.asarray(own)
    check_walks(accepted, guesses, own, lambda row, a, b: guesses[row, b - 1] == own[row, a])


def test_equal_guesses_of_draws_follow_the_model():
    """Certain guesses, here the likeliest tokens, and tokens that the model draws."""
    line = [ROOT]
    for _ in range(3):
        line.append(int(MODEL[line[-1]].argmax()))
    own = draw(jax.random.key(8), np.tile(MODEL[line], (DRAWS, 1, 1)))
    guesses = jnp.broadcast_to(jnp.array(line[1:]), (DRAWS, 3))
    check_follows_the_model(accept_equal(chain(3), guesses, own))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.5, 0.6)])
def test_typical_guesses_are_walked(epsilon, delta):
    arrays = random_tree(500)
    accept = functools.partial(accept_typical, TREE, epsilon=epsilon, delta=delta)
    accepted = jax.jit(accept)(*arrays)
    guesses, probabilities, own = map(np.asarray, arrays)

    def passes(row, a, b):
        p = probabilities[row, a].astype(np.float64)
        entropy = -sum(x * np.log(x) for x in p if x > 0)
        return p[guesses[row, b - 1]] > min(epsilon, delta * np.exp(-entropy))

    check_walks(accepted, guesses, own, passes)


def test_impossible_tokens_are_not_typical():
    certain = jnp.zeros((1, 2, 3)).at[..., 1].set(1.0)
    for guess, count in ((1, 1), (0, 0)):
        own = jnp.ones((1, 2), jnp.int32)
        accepted = accept_typical(chain(1), jnp.array([[guess]]), certain, own)
        assert int(accepted.count[0]) == count


def test_bad_input():
    tokens = jnp.zeros((2, 3), jnp.int32)
    p = jnp.ones((2, 4, 5)) / 5
    with pytest.raises(ValueError, match=r"accept_equal: guesses \(2, 3\) must be \(B, 9\)"):
        accept_equal(TREE, tokens, jnp.zeros((2, 10), jnp.int32))
    with pytest.raises(ValueError, match=r"accept_equal: .* model's \[\(2, 3\)\] \(B, 4, ...\)"):
        accept_equal(chain(3), tokens, tokens)
    with pytest.raises(ValueError, match=r"accept_typical: delta holds -1"):
        accept_typical(chain(3), tokens, p, tokens[:, [0, 0, 0, 0]], delta=-1.0)
    with pytest.raises(ValueError, match=r"accept_drawn: probabilities \(2, 3, 5\) must be"):
        accept_drawn(jax.random.key(0), tokens, p[:, :3], p[:, :3])
    with pytest.raises(ValueError, match=r"accept_drawn_tree: drafted \(2, 4, 5\) must be one q"):
        accept_drawn_tree(jax.random.key(0), chain(3), tokens, p, p)
