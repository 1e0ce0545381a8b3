"""The shape of a tree of candidates, against Medusa's definitions node by node."""

import itertools

import numpy as np
import pytest

from jaxmodels.ops.candidate_tree import CandidateTree, chain, grow_tree

TREE = CandidateTree(((1,), (0, 2), (0,), (1, 0), (0, 0), (0, 2, 1)))
NODES = [(), (0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 1)]


def test_nodes_come_by_depth():
    assert list(TREE.nodes) == NODES and len(TREE) == 7
    np.testing.assert_array_equal(TREE.depths, [0, 1, 1, 2, 2, 2, 3])
    np.testing.assert_array_equal(TREE.parents, [0, 0, 0, 1, 1, 2, 4])
    np.testing.assert_array_equal(TREE.ranks, [0, 0, 1, 0, 2, 0, 1])
    assert TREE.depth == 3 and not TREE.is_chain


def test_a_node_is_of_what_it_begins_with():
    want = [[node[: len(other)] == other for other in NODES] for node in NODES]
    np.testing.assert_array_equal(TREE.among, want)
    np.testing.assert_array_equal(TREE.paths[[0, 2, 6]], [[0, 0, 0, 0], [0, 2, 2, 2], [0, 1, 4, 6]])


def test_a_chain_is_causal():
    tree = chain(4)
    assert tree.is_chain and tree.depth == 4 and len(tree) == 5
    np.testing.assert_array_equal(tree.among, np.tri(5, dtype=bool))
    np.testing.assert_array_equal(tree.paths[-1], np.arange(5))
    # Of the same number of nodes as of depths, but another shape.
    assert not CandidateTree(((0,), (1,))).is_chain


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((), r"choices must be distinct and not empty, not \(\)"),
        (((0,), (0,)), "must be distinct"),
        (((0,), ()), "must be distinct"),
        (((0,), (1, 0)), r"\(1, 0\) continues \(1,\), which is no choice; add it"),
    ],
)
def test_bad_trees(choices, message):
    with pytest.raises(ValueError, match=message):
        CandidateTree(choices)


def test_a_chain_of_nothing():
    with pytest.raises(ValueError, match="chain: length=0 guesses nothing"):
        chain(0)


def test_trees_grow_where_guesses_are_likeliest():
    accuracies = np.array([[0.61, 0.23, 0.11], [0.53, 0.29, 0.07], [0.41, 0.13, 0.05]])
    every = [
        choice for depth in range(1, 4) for choice in itertools.product(range(3), repeat=depth)
    ]
    right = {c: np.prod([accuracies[place, rank] for place, rank in enumerate(c)]) for c in every}
    for size in (1, 2, 9, 17):
        best = sorted(every, key=right.get)[-size:]
        assert {*grow_tree(accuracies, size).choices} == {*best}


def test_a_tree_cannot_outgrow_its_heads():
    with pytest.raises(ValueError, match=r"grow_tree: size=13 must be in \[1, 12\]"):
        grow_tree(np.full((2, 3), 0.1), 13)
