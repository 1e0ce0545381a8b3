"""Which numbers a training step computes in.

Parameters, their gradients, the optimizer and the moving average are float32
always; the policy names only what the forward and backward pass compute in.
float16 needs its loss scaled as well, see `loss_scale`; float8 is bfloat16 with the
products of linear maps and experts in eight bits, see `ops.float8`.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.ops.float8 import float8_products
from jaxmodels.training.sharding import path_name

_COMPUTE_DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float8": jnp.bfloat16,
}


def compute_dtype(precision: str) -> Any:
    """The dtype a policy computes in; give it to the model as its `dtype`.

    Args:
      precision: `"float32"`, `"bfloat16"`, `"float16"`, or `"float8"`, which
        computes in bfloat16 but for its products.

    Raises:
      ValueError: unknown policy.
    """
    if precision not in _COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype: precision={precision!r} is not a policy; "
            f"choose one of {', '.join(_COMPUTE_DTYPES)}"
        )
    return _COMPUTE_DTYPES[precision]


def scales_loss(precision: str) -> bool:
    """Whether a policy's gradients underflow without a loss scale.

    Args:
      precision: as in `compute_dtype`.

    Raises:
      ValueError: unknown policy.
    """
    return compute_dtype(precision) == jnp.float16


def products(precision: str) -> contextlib.AbstractContextManager[None]:
    """What a policy wants of the matrix products that are traced within it."""
    return float8_products(precision == "float8")


def cast_floating(tree: Any, dtype: Any, keep: frozenset[str] = frozenset()) -> Any:
    """Casts the floating-point leaves of a tree, leaving integers and keys alone.

    Args:
      tree: of arrays.
      dtype: what to cast to.
      keep: paths of leaves to leave alone as well.
    """

    def cast(path, leaf):
        low = jnp.issubdtype(leaf.dtype, jnp.floating) and path_name(path) not in keep
        return leaf.astype(dtype) if low else leaf

    return jax.tree.map_with_path(cast, tree)


def matching_paths(params: Any, pattern: str | None) -> frozenset[str]:
    """The paths of a parameter tree that a regular expression is found in; none for None.

    Raises:
      ValueError: the pattern is no regular expression, or found nowhere.
    """
    if pattern is None:
        return frozenset()
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(
            f"make_step: keep_float32={pattern!r} is not a regular expression: {error}"
        ) from None
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = frozenset(filter(search, names))
    if not found:
        raise ValueError(
            f"make_step: keep_float32={pattern!r} is found in no parameter; there are "
            f"{', '.join(names[:3])}, ... ({len(names)} in all)"
        )
    return found


@contextlib.contextmanager
def float32_where_kept() -> Iterator[None]:
    """Within it, linen modules whose parameters are float32 compute in float32.

    A module's `dtype` would round such a parameter again on its way in; for the
    call alone it is float32 here. Of a layer without inner modules one float32
    parameter is enough. A result of its input's shape is handed on in its
    input's dtype, so that a residual stream keeps its own; others, such as
    logits, stay float32.
    """

    def by_parameters(call, args, kwargs, context):
        module = context.module
        params = {} if module.scope is None else module.variables.get("params", {})
        high = [leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)]
        if not any(high):
            return call(*args, **kwargs)
        is_layer = not any(isinstance(inner, Mapping) for inner in params.values())
        with _float32_dtype(module) if is_layer or all(high) else contextlib.nullcontext():
            return _as_given(call(*args, **kwargs), args)

    with nn.intercept_methods(by_parameters):
        yield


@contextlib.contextmanager
def _float32_dtype(module: nn.Module) -> Iterator[None]:
    if (own := getattr(module, "dtype", None)) is None:
        yield
        return
    # Linen's modules are frozen, and a clone would not be the one that is bound here.
    object.__setattr__(module, "dtype", jnp.float32)
    try:
        yield
    finally:
        object.__setattr__(module, "dtype", own)


def _as_given(result: Any, args: Any) -> Any:
    arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
    given = {x.shape: x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)}

    def hand_on(leaf):
        high = isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
        return leaf.astype(given.get(leaf.shape, leaf.dtype)) if high else leaf

    return jax.tree.map(hand_on, result)
