"""What of a forward pass is kept for the backward pass, and what is computed again.

Names of policies, which models take as their field `remat`; n is the number of blocks:

| policy     | kept over the forward pass    | held while going back   | forward passes |
|------------|-------------------------------|-------------------------|----------------|
| none       | all                           | nothing more            | 1              |
| dots       | products, outputs of attention, block inputs | one block | 1, without products |
| offload    | as dots, in the host's memory | one block               | 1, without products |
| blocks     | inputs of n blocks            | one block               | 2              |
| sqrt       | inputs of about sqrt(n) groups | products of one group  | 2              |
| everything | inputs of about sqrt(n) groups | inputs of one group's blocks, one block | 3 |

Products are those of weights (matrix products and convolutions), not those of
attention; of that its output and log-sum-exp are kept where they are our own
(`ops.attention_blocked`), and with them its forward pass is not run again.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"
(arXiv:1604.06174), sections 3 and 4.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# What attention keeps for its backward pass, as `jax.ad_checkpoint.checkpoint_name` has it.
ATTENTION = "attention"

POLICIES = ("none", "dots", "blocks", "sqrt", "everything", "offload")
_GROUPED = ("sqrt", "everything")

Body = Callable[[Any, Any], tuple[Any, Any]]


def require_policy(model: str, remat: str) -> None:
    """Raises unless `remat` names a policy that works here.

    Args:
      model: whose field it is, for the message.
      remat: the field.

    Raises:
      ValueError: no such policy, or "offload" where the platform has no memory to
        offload to.
    """
    if remat not in POLICIES:
        raise ValueError(f"{model}: remat={remat!r} is none of {list(POLICIES)}")
    platform = jax.default_backend()
    # CPUs name such a memory and compile nothing that uses it.
    if remat == "offload" and platform == "cpu":
        raise ValueError(
            f'{model}: remat="offload" needs a device beside the host, and the platform is '
            f'{platform}; use "sqrt" or "everything"'
        )


def group_size(count: int, remat: str) -> int:
    """Blocks that are computed again together: about the root of `count`, or 1.

    A divisor of `count` if one is within a factor of two of the root: the last of unequal
    groups needs a copy of its parameters.
    """
    if remat not in _GROUPED:
        return 1
    root = math.sqrt(count)
    near = [size for size in range(1, count + 1) if root / 2 <= size <= 2 * root]
    even = [size for size in near if count % size == 0]
    return min(even, key=lambda size: max(size, count // size), default=math.isqrt(count))


def checkpoint_policy(remat: str) -> Callable[..., Any]:
    """What one block keeps by a policy other than "none", in the form of `jax.checkpoint`."""
    if remat in ("blocks", "everything"):
        return jax.checkpoint_policies.nothing_saveable
    if remat == "offload":
        return jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    return products_saveable


def products_saveable(primitive: Any, *values: Any, **params: Any) -> bool:
    """Keeps the products of weights and what attention names, as a policy of `jax.checkpoint`."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    named = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    return (
        primitive is lax.conv_general_dilated_p
        or dots(primitive, *values, **params)
        or named(primitive, *values, **params)
    )


def scan_blocks(body: Body, carry: Any, xs: Any, remat: str) -> tuple[Any, Any]:
    """`jax.lax.scan` whose backward pass computes again what the policy does not keep.

    Args:
      body: `(carry, x) -> (carry, y)`, one block.
      carry: what the first block gets.
      xs: stacked, an entry a block: its parameters and whatever else is its own.
      remat: one of `POLICIES`.

    Returns:
      The last carry, and the stacked ys, as `jax.lax.scan`; values and gradients do
      not depend on the policy.

    Raises:
      ValueError: as `require_policy`.

    Source: Chen et al. 2016 (arXiv:1604.06174), section 4.1; the blocks of a group keep
    their products when the group is computed again.
    """
    require_policy("scan_blocks", remat)
    count = jax.tree.leaves(xs)[0].shape[0]
    if remat != "none":
        # A loop already keeps the two passes apart; but XLA takes one of one step away.
        alone = count == 1
        body = jax.checkpoint(body, policy=checkpoint_policy(remat), prevent_cse=alone)
    if remat not in _GROUPED or count == 1:
        return lax.scan(body, carry, xs)
    size = group_size(count, remat)
    whole = count - count % size

    def group(carry, xs):
        return lax.scan(body, carry, xs)

    again = jax.checkpoint(
        group, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False
    )
    first = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs)
    carry, ys = lax.scan(again, carry, first)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole == count:
        return carry, ys
    carry, rest = group(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda a, b: lax.concatenate([a, b], 0), ys, rest)
