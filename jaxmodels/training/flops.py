"""How many floating-point operations a step takes, and which share of the machine that is."""

import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Dense products of the makers' data sheets, operations a second of one device, in the type
# that products are made in there: bfloat16, or TF32 and FP32 of older ones.
_PEAKS = {
    "TPU v2": 22.5e12,  # of a core, as JAX counts devices before v4
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def step_flops(step: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Operations of one call of a jitted function.

    XLA's own analysis counts the body of a loop once, however often it runs, so a
    model that scans its layers seems cheaper than it is. This counts matrix products
    and convolutions, 2 for each multiplication, with loops as often as they run where
    the number is known before (`scan`, and `fori_loop` with fixed limits), and once else.

    Args:
      step: a function compiled by `jax.jit`.
      *arguments: those of a call; the trace of an earlier call is used again.

    Returns:
      The products counted here, and all operations that XLA counts.
    """
    products = _count(step.trace(*arguments).jaxpr.jaxpr)
    analysis = step.lower(*arguments).cost_analysis() or {}
    return products, float(analysis.get("flops", 0.0))


def peak_flops(devices: int) -> float:
    """Operations a second that so many devices like the first could do at most.

    From the data sheet by the device's name; elsewhere, and on CPU, where virtual devices
    share the cores, that of a large product of matrices measured now.
    """
    device = jax.devices()[0]
    known = [name for name in _PEAKS if re.match(rf"{name}\b", device.device_kind)]
    if known:
        # "TPU v5 lite" begins like "TPU v5", which is another one.
        return devices * _PEAKS[max(known, key=len)]
    size, times = 1024, []
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    for _ in range(5):
        started = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) * (1 if device.platform == "cpu" else devices)


def _count(jaxpr: core.Jaxpr) -> float:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation: core.JaxprEqn) -> float:
    name, parameters = equation.primitive.name, equation.params
    shapes = [variable.aval.shape for variable in equation.invars]
    out = equation.outvars[0].aval.shape if equation.outvars else ()
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        return 2.0 * math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)
    if name == "ragged_dot_general":
        return 2.0 * math.prod(out) * shapes[0][-1]
    if name == "conv_general_dilated":
        # The kernel's channels are those of one group already.
        kernel = shapes[1]
        outputs = parameters["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(out) * math.prod(kernel) / kernel[outputs]
    inner = [x for value in parameters.values() for x in _jaxprs(value)]
    if name == "cond":
        return max(map(_count, inner), default=0.0)
    return parameters.get("length", 1) * sum(map(_count, inner)) if inner else 0.0


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """The programs among an equation's parameters; functions of rules are none."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [x for part in value for x in _jaxprs(part)] if isinstance(value, tuple | list) else []
