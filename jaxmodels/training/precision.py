"""Which numbers a training step computes in.

Parameters, their gradients, the optimizer and the moving average are float32
always; the policy names only what the forward and backward pass compute in.
"""

from typing import Any

import jax
import jax.numpy as jnp

_COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(precision: str) -> Any:
    """The dtype a policy computes in; give it to the model as its `dtype`.

    Args:
      precision: `"float32"` or `"bfloat16"`.

    Raises:
      ValueError: unknown policy.
    """
    if precision not in _COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype: precision={precision!r} is not a policy; "
            f"choose one of {', '.join(_COMPUTE_DTYPES)}"
        )
    return _COMPUTE_DTYPES[precision]


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts the floating-point leaves of a tree, leaving integers and keys alone."""

    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
