"""Trees of tokens that may follow a text: which node continues which."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class CandidateTree:
    """The static shape of what is guessed ahead; only the tokens differ from text to text.

    Node 0 is the root, the last token that is certain. The others follow sorted by
    depth, so that no node precedes its parent.

    Attributes:
      choices: a tuple a node but the root: of each node on the way to it from the
        root, which guess it is, the best (0), the second best (1), and so on.
        ((0,), (1,), (0, 0)) has two guesses of the next token, and the best guess of
        the token after that for the better one of them.

    Raises:
      ValueError: a choice comes twice, or the node that it continues is missing.

    Source: Cai et al. 2024, "Medusa", section 2.1.2 (arXiv:2401.10774), whose
    published code lists trees in this form.
    """

    choices: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        known = {(), *self.choices}
        if not self.choices or len(known) <= len(self.choices):
            raise ValueError(
                f"CandidateTree: choices must be distinct and not empty, not {self.choices}"
            )
        if orphans := [c for c in self.choices if c[:-1] not in known]:
            raise ValueError(
                f"CandidateTree: {orphans[0]} continues {orphans[0][:-1]}, which is no choice; "
                f"add it"
            )

    @functools.cached_property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Root and choices, by depth."""
        return ((), *sorted(self.choices, key=lambda choice: (len(choice), choice)))

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def depth(self) -> int:
        """Of the deepest node; the root's is 0."""
        return len(self.nodes[-1])

    @property
    def is_chain(self) -> bool:
        """Whether there is one guess of each token."""
        return self.depth == len(self.choices)

    @property
    def depths(self) -> Int[np.ndarray, "N"]:
        """How many tokens after the root each node is."""
        return np.array([len(node) for node in self.nodes], np.int32)

    @property
    def parents(self) -> Int[np.ndarray, "N"]:
        """Which node each node continues; the root itself."""
        return np.array([self.nodes.index(node[:-1]) for node in self.nodes], np.int32)

    @property
    def ranks(self) -> Int[np.ndarray, "N"]:
        """Which guess after its parent each node is; the root's is 0."""
        return np.array([node[-1] if node else 0 for node in self.nodes], np.int32)

    @property
    def paths(self) -> Int[np.ndarray, "N P"]:
        """The nodes from the root to each node, filled up with the node itself."""
        rows = []
        for node in self.nodes:
            line = [self.nodes.index(node[:n]) for n in range(len(node) + 1)]
            rows.append(line + line[-1:] * (self.depth - len(node)))
        return np.array(rows, np.int32)

    @property
    def among(self) -> Bool[np.ndarray, "N N"]:
        """True where the node of the row is that of the column, or comes after it."""
        found = np.zeros((len(self), len(self)), bool)
        np.put_along_axis(found, self.paths, True, axis=1)
        return found


def chain(length: int) -> CandidateTree:
    """One guess of each of the next `length` tokens.

    Raises:
      ValueError: length is below 1.
    """
    if length < 1:
        raise ValueError(f"chain: length={length} guesses nothing; pass 1 or more")
    return CandidateTree(tuple((0,) * n for n in range(1, length + 1)))


def grow_tree(accuracies: Float[np.ndarray, "N R"], size: int) -> CandidateTree:
    """The tree of `size` guesses that is expected to win the most tokens.

    A node is right as often as the accuracies on the way to it multiply to, taken as
    independent; the likeliest nodes are taken. None is likelier than its parent.

    Args:
      accuracies: how often the guess of each rank is right, for each depth.
      size: nodes besides the root.

    Returns:
      The tree.

    Raises:
      ValueError: size is not positive, or more than all nodes there could be.

    Source: Cai et al. 2024, "Medusa", section 2.3.3 (arXiv:2401.10774).
    """
    depth, width = accuracies.shape
    most = sum(width**n for n in range(1, depth + 1))
    if not 0 < size <= most:
        raise ValueError(
            f"grow_tree: size={size} must be in [1, {most}], all that accuracies "
            f"{accuracies.shape} (depths, ranks) allow"
        )

    def right(choice):
        return math.prod(accuracies[place, rank] for place, rank in enumerate(choice))

    taken: list[tuple[int, ...]] = []
    # Children of what is taken.
    open_nodes = {(rank,) for rank in range(width)}
    while len(taken) < size:
        best = max(sorted(open_nodes), key=right)
        taken.append(best)
        open_nodes.remove(best)
        if len(best) < depth:
            open_nodes |= {(*best, rank) for rank in range(width)}
    return CandidateTree(tuple(taken))
