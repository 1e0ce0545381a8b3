"""Blocks that follow one another, run by a policy of rematerialisation.

Three forms, for the three ways in which models hold their blocks:

* `run_stacked`: one module whose parameters are stacked along a leading axis.
* `run_listed`: a list of modules; equal neighbours are stacked inside and scanned.
* `run_in_turn`: a list of modules of any kind, one call after the other.

The policies are those of `jaxmodels.ops.rematerialisation`; none of them changes a
model's parameters, their initial values, its results or what it draws.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.ops.rematerialisation import (
    POLICIES,
    checkpoint_policy,
    group_size,
    require_policy,
    scan_blocks,
)

__all__ = ["POLICIES", "require_policy", "run_in_turn", "run_listed", "run_stacked"]


def run_stacked(
    call: Callable[[nn.Module, Any, Any], Any],
    block: nn.Module,
    x: Any,
    rest: Any,
    depth: int,
    remat: str,
) -> Any:
    """Applies one module `depth` times, each time with the next of its stacked parameters.

    Args:
      call: `(block, x, rest_i) -> x`, one block.
      block: a module that belongs to the model; all its variables are parameters.
      x: what the first block gets.
      rest: stacked likewise, what else is each block's own; or None.
      depth: number of blocks.
      remat: a policy.

    Returns:
      What the last block gives.

    Raises:
      ValueError: as `require_policy`.
    """
    if block.is_initializing():
        initialise = nn.scan(
            lambda block, x, rest: (call(block, x, rest), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=depth,
        )
        return initialise(block, x, rest)[0]
    keys = {}
    if block.has_rng("dropout"):
        keys["dropout"] = jax.random.split(block.make_rng("dropout"), depth)
    one = nn.apply(call, block.clone(parent=None, name=None))

    def body(x, own):
        params, keys, rest = own
        return one({"params": params}, x, rest, rngs=keys), None

    own = block.variables["params"], keys, rest
    return scan_blocks(body, x, own, remat)[0]


def run_listed(
    call: Callable[[nn.Module, Any], Any], blocks: Sequence[nn.Module], x: Any, remat: str
) -> Any:
    """Applies blocks one after the other, equal neighbours as one scan over stacked variables.

    A scan is traced once whatever its length, and no compiler undoes the rematerialisation
    in it. The stack is a copy of the parameters, and to compile its making takes XLA about
    as long as the blocks of a narrow model. A block without an equal neighbour is a scan
    of one, which XLA takes away.

    Args:
      call: `(block, x) -> x`, one block.
      blocks: modules that belong to the model. They may change other collections than
        the parameters, and sow; they draw nothing.
      x: what the first block gets.
      remat: a policy.

    Returns:
      What the last block gives.

    Raises:
      ValueError: as `require_policy`.
    """
    if blocks[0].is_initializing():
        for block in blocks:
            x = call(block, x)
        return x
    pairs = [(block, *block.unbind()) for block in blocks]
    for module, run in groupby(pairs, key=lambda pair: pair[1]):
        bound, _, variables = zip(*run, strict=True)
        x = _run_equal(call, module, bound, variables, x, remat)
    return x


def _run_equal(call, module, bound, variables, x, remat):
    mutable = bound[0].scope.mutable
    one = nn.apply(call, module, mutable=mutable or [])

    def body(x, variables):
        return one(variables, x)

    x, changed = scan_blocks(body, x, jax.tree.map(_stack, *variables), remat)
    for i, block in enumerate(bound):
        for collection, values in changed.items():
            for name, value in jax.tree.map(lambda leaf, i=i: leaf[i], dict(values)).items():
                block.put_variable(collection, name, value)
    return x


def _stack(*leaves: Any) -> Any:
    return jnp.stack(leaves)


def run_in_turn(
    call: Callable[[nn.Module, int, Any], Any],
    model: nn.Module,
    x: Any,
    count: int,
    remat: str,
    *,
    last: bool = True,
) -> Any:
    """Applies the blocks of a model one after the other, computed again by the policy.

    The blocks need not be equal. Nothing but an optimisation barrier keeps a compiler from
    merging what is computed again with the first time: on CPUs XLA does merge them, so that
    there only a scan saves memory, unless the process was tuned (`cpu.tune`); on GPUs and
    TPUs it does not.

    Args:
      call: `(model, i, x) -> x`, block i.
      model: whose submodules `call` uses.
      x: what the first block gets.
      count: number of blocks.
      remat: a policy.
      last: the backward pass begins with these blocks, so that the last group of them
        need not be computed again.

    Returns:
      What the last block gives.

    Raises:
      ValueError: as `require_policy`.
    """
    require_policy(type(model).__name__, remat)
    if remat == "none" or model.is_initializing():
        for i in range(count):
            x = call(model, i, x)
        return x
    size = group_size(count, remat)

    def run(model, x, blocks):
        for i in blocks:
            one = nn.remat(lambda model, x, i=i: call(model, i, x), policy=checkpoint_policy(remat))
            x = one(model, x)
        return x

    for first in range(0, count, size):
        blocks = range(first, min(first + size, count))
        if len(blocks) > 1 and not (last and blocks[-1] == count - 1):
            x = nn.remat(lambda model, x, blocks=blocks: run(model, x, blocks))(model, x)
        else:
            x = run(model, x, blocks)
    return x
