"""Which guesses of the next tokens a language model accepts, and what it says instead.

The model has read a tree of candidates (`ops.candidate_tree`) in one go, and says
what it would have said after each node. All rules return a path from the root to
the last accepted node and one more token of the model's own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodels.ops.candidate_tree import CandidateTree
from jaxmodels.ops.checks import require_shape, require_within


class Accepted(NamedTuple):
    """What becomes of a tree of depth P - 1.

    Fields:
      tokens: of each text, the first `count` are guesses that were accepted, the one
        after them is the model's own; the others mean nothing.
      path: the root and the nodes of the accepted guesses, `count` + 1 in all; the
        others mean nothing.
      count: how many guesses were accepted.
    """

    tokens: Int[Array, "B P"]
    path: Int[Array, "B P"]
    count: Int[Array, "B"]


def accept_equal(
    tree: CandidateTree, guesses: Int[Array, "B M"], own: Int[Array, "B N"]
) -> Accepted:
    """Accepts the guesses that the model says itself.

    With `own` the model's likeliest tokens, this is greedy decoding. With tokens drawn
    from its distributions, it is sampling: a text goes where the model's draws go, and
    the tree has only saved time. It is the rejection rule for guesses that are certain
    given the text before them.

    Args:
      tree: of the candidates.
      guesses: the tokens of all nodes but the root; equal ones do not share a parent.
      own: what the model says after each node.

    Returns:
      The longest path of guesses that agree.

    Raises:
      ValueError: tokens are not as many as nodes.

    Source: Stern, Shazeer & Uszkoreit 2018, "Blockwise Parallel Decoding", section 3
    (arXiv:1811.03115).
    """
    _require_nodes("accept_equal", tree, guesses, own)
    agree = guesses == own[:, tree.parents[1:]]
    return _longest(tree, agree, guesses, own)


def accept_typical(
    tree: CandidateTree,
    guesses: Int[Array, "B M"],
    probabilities: Float[Array, "B N V"],
    own: Int[Array, "B N"],
    *,
    epsilon: float | Float[Array, ""] = 0.09,
    delta: float | Float[Array, ""] = 0.3,
) -> Accepted:
    """Accepts guesses that the model finds likely enough, whatever it would have drawn.

    guess accepted if p(guess) > min(epsilon, delta exp(-H(p))),   H the entropy

    The result is no sample of the model's distribution; it is text that the model
    finds typical.

    Args:
      tree: of the candidates.
      guesses: the tokens of all nodes but the root.
      probabilities: the model's, of what follows each node.
      own: what the model says after each node, for where guesses end.
      epsilon: the most probability that is ever asked for.
      delta: what is asked for in units of the typical probability.

    Returns:
      The longest path of accepted guesses.

    Raises:
      ValueError: tokens are not as many as nodes, or epsilon or delta is negative.

    Source: Cai et al. 2024, "Medusa", section 2.3.1 (arXiv:2401.10774). Delta is the
    root of epsilon, as there. The first guess has to pass as well; the paper's own
    token, which always counts, is the root here.
    """
    _require_nodes("accept_typical", tree, guesses, own, probabilities)
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        require_within("accept_typical", name, value, 0, float("inf"))
    before = probabilities[:, tree.parents[1:]]
    of_guess = jnp.take_along_axis(before, guesses[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(jax.scipy.special.entr(before), axis=-1)
    asked = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
    return _longest(tree, of_guess > asked, guesses, own)


def accept_drawn(
    key: Key[Array, ""],
    guesses: Int[Array, "B K"],
    drafted: Float[Array, "B K V"],
    probabilities: Float[Array, "B P V"],
) -> Accepted:
    """Accepts guesses of a chain that were drawn, so that the result is drawn from the model.

    accept guess x with probability min(1, p(x) / q(x));
    at the first refusal draw from max(0, p - q), normalised; after the last guess from p

    Args:
      key: of all that is drawn.
      guesses: the chain.
      drafted: q, the distributions that they were drawn from.
      probabilities: p, the model's; one more than guesses.

    Returns:
      The guesses before the first refusal, and one token more; each is distributed as p
      given what is before it.

    Raises:
      ValueError: shapes disagree.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
    Decoding", algorithm 1 (arXiv:2211.17192).
    """
    batch, length = guesses.shape
    vocabulary = probabilities.shape[-1]
    shapes = ("drafted", drafted, length), ("probabilities", probabilities, length + 1)
    for name, array, rows in shapes:
        wanted = (batch, rows, vocabulary)
        require_shape("accept_drawn", name, array, wanted, f"for guesses {guesses.shape}")
    accept_key, draw_key = jax.random.split(key)
    p, q = (
        jnp.take_along_axis(x, guesses[..., None], axis=-1)[..., 0]
        for x in (probabilities[:, :-1], drafted)
    )
    accepted = jax.random.uniform(accept_key, p.shape) * q < p
    count = jnp.sum(jnp.cumprod(accepted, axis=1), axis=1)
    # After the last guess, there is nothing to take off.
    drafted = jnp.pad(drafted, ((0, 0), (0, 1), (0, 0)))
    here = count[:, None, None]
    p, q = (jnp.take_along_axis(x, here, axis=1)[:, 0] for x in (probabilities, drafted))
    last = jax.random.categorical(draw_key, jnp.log(_residual(p, q)))
    places = jnp.arange(length + 1)
    tokens = jnp.where(places[None] < count[:, None], _and_one(guesses), last[:, None])
    return Accepted(tokens, jnp.broadcast_to(places, tokens.shape), count)


def accept_drawn_tree(
    key: Key[Array, ""],
    tree: CandidateTree,
    guesses: Int[Array, "B M"],
    drafted: Float[Array, "B _ V"],
    probabilities: Float[Array, "B N V"],
) -> Accepted:
    """`accept_drawn` where a token has several guesses, which are tried one after the other.

    A guess that is refused leaves p <- max(0, p - q), normalised, to the guesses that
    are left for the same token. Time is O(N V), a node after the other.

    Args:
      key: of all that is drawn.
      tree: of the candidates.
      guesses: the tokens of all nodes but the root.
      drafted: q, what each was drawn from. It may depend on all that was drawn for
        smaller ranks after the same node: guesses drawn without putting back have
        earlier ones removed from their q.
      probabilities: p, the model's, of what follows each node.

    Returns:
      The accepted path, and one token more; each is distributed as p given what is
      before it.

    Raises:
      ValueError: tokens are not as many as nodes, or shapes disagree.

    Source: Miao et al. 2024, "SpecInfer", algorithm 2 (arXiv:2305.09781); guesses without
    putting back from Jeon et al. 2024, "Recursive Speculative Decoding"
    (arXiv:2402.14160).
    """
    _require_nodes("accept_drawn_tree", tree, guesses, probabilities, probabilities)
    wanted = (*guesses.shape, probabilities.shape[-1])
    require_shape("accept_drawn_tree", "drafted", drafted, wanted, "one q a guess")
    accept_key, draw_key = jax.random.split(key)
    luck = jax.random.uniform(accept_key, guesses.shape)

    def try_node(carry, node):
        here, p = carry
        number, parent, guess, q, luck, after = node
        ratio = [jnp.take_along_axis(x, guess[:, None], axis=-1)[:, 0] for x in (p, q)]
        tried = here == parent
        accepted = tried & (luck * ratio[1] < ratio[0])
        left = jnp.where(tried[:, None], _residual(p, q), p)
        return (jnp.where(accepted, number, here), jnp.where(accepted[:, None], after, left)), None

    nodes = (
        jnp.arange(1, len(tree)),
        jnp.asarray(tree.parents[1:]),
        guesses.T,
        drafted.swapaxes(0, 1),
        luck.T,
        probabilities[:, 1:].swapaxes(0, 1),
    )
    start = jnp.zeros(len(guesses), jnp.int32), probabilities[:, 0]
    (last, p), _ = lax.scan(try_node, start, nodes)
    own = jax.random.categorical(draw_key, jnp.log(p))
    return _along(tree, last, guesses, own)


def _residual(p: Float[Array, "B V"], q: Float[Array, "B V"]) -> Float[Array, "B V"]:
    left = jnp.maximum(p - q, 0)
    total = jnp.sum(left, axis=-1, keepdims=True)
    # Without rounding, what is nowhere likelier than q would have been accepted.
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1), p)


def _longest(
    tree: CandidateTree, passed: Bool[Array, "B M"], guesses: Array, own: Int[Array, "B N"]
) -> Accepted:
    """The longest path whose guesses have all passed."""
    passed = jnp.pad(passed, ((0, 0), (1, 0)), constant_values=True)
    whole = jnp.all(passed[:, None, :] | ~tree.among[None], axis=-1)
    last = jnp.argmax(jnp.where(whole, tree.depths[None], -1), axis=-1)
    return _along(tree, last, guesses, jnp.take_along_axis(own, last[:, None], axis=-1)[:, 0])


def _along(tree: CandidateTree, last: Int[Array, "B"], guesses: Array, own: Array) -> Accepted:
    """The path to a node, and the model's own token after it."""
    path, count = jnp.asarray(tree.paths)[last], jnp.asarray(tree.depths)[last]
    # The guess at each place of the path is the token of the node after it.
    tokens = _and_one(jnp.take_along_axis(guesses, path[:, 1:] - 1, axis=1))
    places = jnp.arange(path.shape[1])
    return Accepted(jnp.where(places[None] < count[:, None], tokens, own[:, None]), path, count)


def _and_one(guesses: Int[Array, "B K"]) -> Int[Array, "B P"]:
    return jnp.pad(guesses, ((0, 0), (0, 1)))


def _require_nodes(name: str, tree: CandidateTree, guesses: Array, *of_nodes: Array) -> None:
    if any(x.shape[:2] != (len(guesses), len(tree)) for x in of_nodes) or (
        guesses.shape[1] != len(tree) - 1
    ):
        raise ValueError(
            f"{name}: guesses {guesses.shape} must be (B, {len(tree) - 1}), a token a node but "
            f"the root, and the model's {[x.shape for x in of_nodes]} (B, {len(tree)}, ...)"
        )
