"""What a function may ask of its arguments, said clearly where it does not hold."""

import jax
import numpy as np
from jax.typing import ArrayLike


def require_within(
    function: str,
    name: str,
    value: ArrayLike,
    low: float | int,
    high: float | int,
    *,
    open_low: bool = False,
) -> None:
    """Raises unless all of `value` is in [low, high], or (low, high] with `open_low`.

    Inside a compiled function there are no values to look at and nothing is
    checked; called with concrete arrays, it is.

    Raises:
      ValueError: naming the function, the argument and the worst value.
    """
    if isinstance(value, jax.core.Tracer):
        return
    found = np.asarray(value, np.float64)
    good = ((found > low) if open_low else (found >= low)) & (found <= high)
    if not good.all():
        worst = found[~good].ravel()[0]
        left = "(" if open_low else "["
        raise ValueError(f"{function}: {name} holds {worst:g}, outside {left}{low:g}, {high:g}]")


def require_shape(
    function: str, name: str, array: jax.Array, shape: tuple[int, ...], meaning: str
) -> None:
    """Raises unless `array` has `shape`, which the error explains as `meaning`.

    Raises:
      ValueError: naming the function, the argument, both shapes and their meaning.
    """
    if array.shape != shape:
        raise ValueError(f"{function}: {name} {array.shape} must be {meaning} = {shape}")
