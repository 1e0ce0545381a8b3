"""Nonlinearities by name, and those that `jax.nn` lacks or does slowly."""

import difflib
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key


def activation(name: str) -> Callable[[Array], Array]:
    """The function that goes by a name in papers, torch and Hugging Face's configurations.

    Args:
      name: a key of `ACTIVATIONS`. "gelu" is the exact one. Gated functions (those
        whose name ends with "glu") halve the last axis, all others keep the shape.

    Returns:
      A function of one array.

    Raises:
      ValueError: unknown name; the nearest are listed.
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"activation: unknown name {name!r}; {hint or f'known: {sorted(ACTIVATIONS)}'}"
        )
    return ACTIVATIONS[name]


def heaviside(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """1 where x >= 0, else 0: the threshold of McCulloch and Pitts. Its gradient is zero."""
    return (x >= 0).astype(x.dtype)


@jax.custom_jvp
def _step(x):
    return heaviside(x)


# The step passed over: what makes gradient descent the perceptron's rule.
_step.defjvp(lambda primals, tangents: (heaviside(*primals), *tangents))


def threshold_perceptron(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None = None
) -> Float[Array, "*B F"]:
    """Fires, with 1, where a weighted sum reaches its threshold, and is silent, with 0, elsewhere.

    out_f = [sum_d x_d kernel_df + bias_f >= 0]

    The gradient is that of the weighted sum, as though there were no step. So a
    step of size one down the gradient of (out - target)^2 / 2 is the perceptron
    rule, kernel += (target - out) x, which finds a boundary wherever one exists.

    Args:
      x: inputs.
      kernel: weights.
      bias: minus the thresholds; None lets every boundary pass through the origin.

    Returns:
      0 or 1, in the dtype of x.

    Source: Rosenblatt 1958, "The Perceptron", Psychological Review 65; the
    gradient is the straight-through estimator of Bengio et al. 2013
    (arXiv:1308.3432).
    """
    total = x @ kernel
    return _step(total if bias is None else total + bias.reshape((1,) * (x.ndim - 1) + (-1,)))


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, exactly.

    Half the time of `jax.nn.gelu(approximate=False)` on a CPU, whose `erfc` keeps
    the relative error of values that do not matter, far left of zero.

    Source: Hendrycks and Gimpel 2016, section 2 (arXiv:1606.08415).
    """
    return 0.5 * x * (1 + lax.erf(x / math.sqrt(2)))


def quick_gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x sigmoid(1.702 x), the GELU of CLIP.

    Source: Hendrycks and Gimpel 2016, section 2 (arXiv:1606.08415).
    """
    return swish(x, 1.702)


def swish(x: Float[Array, "*B"], beta: float | Float[Array, ""] = 1.0) -> Float[Array, "*B"]:
    """x sigmoid(beta x): SiLU for beta = 1, x / 2 for 0, nearly ReLU for large ones.

    Source: Ramachandran et al. 2017, "Searching for Activation Functions",
    section 4 (arXiv:1710.05941).
    """
    return x * jax.nn.sigmoid(beta * x)


def squared_relu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """max(0, x)^2.

    Source: So et al. 2021, "Primer", section 4 (arXiv:2109.08668).
    """
    return jnp.square(jax.nn.relu(x))


def prelu(x: Float[Array, "*B C"], slope: Float[Array, "S"]) -> Float[Array, "*B C"]:
    """x where x >= 0, slope x elsewhere, with one slope for all channels or one for each.

    Raises:
      ValueError: slopes neither one nor as many as channels.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 1
    (arXiv:1502.01852).
    """
    if slope.shape not in ((1,), x.shape[-1:]):
        raise ValueError(
            f"prelu: slope {slope.shape} must hold one value, or one for each of the "
            f"{x.shape[-1]} channels of x {x.shape}"
        )
    return jnp.where(x >= 0, x, slope.reshape((1,) * (x.ndim - 1) + (-1,)) * x)


def rrelu(
    x: Float[Array, "*B"],
    key: Key[Array, ""] | None = None,
    low: float = 1 / 8,
    high: float = 1 / 3,
) -> Float[Array, "*B"]:
    """Leaky ReLU whose slope, left of zero, is drawn for every value.

    Args:
      x: inputs.
      key: draws slopes from [low, high], as in training; None takes their mean.
      low, high: the range.

    Source: Xu et al. 2015, "Empirical Evaluation of Rectified Activations in
    Convolution Network", section 3.4 (arXiv:1505.00853).
    """
    slope = (low + high) / 2
    if key is not None:
        slope = jax.random.uniform(key, x.shape, x.dtype, low, high)
    return jnp.where(x >= 0, x, slope * x)


def maxout(x: Float[Array, "*B F"], pieces: int) -> Float[Array, "*B D"]:
    """The largest of every `pieces` values that lie side by side; D = F / pieces.

    Raises:
      ValueError: pieces does not divide the last axis.

    Source: Goodfellow et al. 2013, "Maxout Networks", section 3
    (arXiv:1302.4389).
    """
    if pieces < 1 or x.shape[-1] % pieces:
        raise ValueError(f"maxout: pieces={pieces} does not divide the last axis of x {x.shape}")
    return x.reshape(*x.shape[:-1], -1, pieces).max(axis=-1)


def gated(x: Float[Array, "*B F"], gate: Callable[[Array], Array]) -> Float[Array, "*B D"]:
    """The first half of the last axis times a function of the second; D = F / 2.

    As `torch.nn.functional.glu`, where the gate is a sigmoid; SwiGLU, GeGLU and
    ReGLU differ in the gate alone.

    Raises:
      ValueError: the last axis cannot be halved.

    Source: Dauphin et al. 2017, equation 1 (arXiv:1612.08083); Shazeer 2020,
    "GLU Variants Improve Transformer", equation 5 (arXiv:2002.05202).
    """
    if x.shape[-1] % 2:
        raise ValueError(f"gated: the last axis of x {x.shape} is odd and cannot be halved")
    value, driver = jnp.split(x, 2, axis=-1)
    return value * gate(driver)


@jax.checkpoint
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up, of which the backward pass keeps nothing but gate and up.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2
    (arXiv:2002.05202).
    """
    return jax.nn.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "heaviside": heaviside,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "relu6": jax.nn.relu6,
    "rrelu": rrelu,
    "squared_relu": squared_relu,
    "relu2": squared_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "hard_tanh": jax.nn.hard_tanh,
    "glu": partial(gated, gate=jax.nn.sigmoid),
    "swiglu": partial(gated, gate=jax.nn.silu),
    "geglu": partial(gated, gate=gelu),
    "reglu": partial(gated, gate=jax.nn.relu),
}
