"""Norms with parameters, by name: of each token, and of batches, alive or frozen."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from jaxmodels.ops.norms import batch_norm as batch_norm_op
from jaxmodels.ops.norms import channels, layer_norm, rms_norm

_EPSILON = 1e-5


class LayerNorm(nn.Module):
    """`ops.norms.layer_norm` with its gain and offset; takes `flax.linen.LayerNorm`'s parameters.

    Attributes:
      epsilon: keeps constant rows finite.
      dtype: of the output; statistics are computed in float32.
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns an array of x's shape in `dtype`."""
        scale = jnp.asarray(self.param("scale", nn.initializers.ones, x.shape[-1:]))
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, x.shape[-1:]))
        return layer_norm(x, scale, bias, epsilon=self.epsilon, dtype=self.dtype)


class RMSNorm(nn.Module):
    """`ops.norms.rms_norm` with its gain; takes the parameters of `flax.linen.RMSNorm`.

    Attributes:
      epsilon, dtype: as of `LayerNorm`.
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns an array of x's shape in `dtype`."""
        scale = jnp.asarray(self.param("scale", nn.initializers.ones, x.shape[-1:]))
        return rms_norm(x, scale, epsilon=self.epsilon, dtype=self.dtype)


# What models call them.
TOKEN_NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class BatchNorm(nn.Module):
    """`ops.norms.batch_norm` with its parameters and running statistics.

    Variables are those of `flax.linen.BatchNorm`: "scale" and "bias" in "params", "mean" and
    "var" in "batch_stats", where the running variance is the biased one.

    Attributes:
      use_running_average: normalises by the running statistics, not by the batch's; None
        leaves it to the call.
      momentum: of the running statistics.
      epsilon: added to the variance.
      dtype: of the output; statistics are computed in float32.
      scale_init: of the scale.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 2
    (arXiv:1502.03167).
    """

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = _EPSILON
    dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B C"], use_running_average: bool | None = None
    ) -> Float[Array, "*B C"]:
        """Returns x normalised, and with the batch's statistics moves the running ones."""
        stored = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        mean, var, scale, bias = _variables(self, x, self.scale_init)
        if stored:
            return _by_running(x, mean.value, var.value, scale, bias, self.epsilon, self.dtype)
        out, *found = batch_norm_op(x, scale, bias, epsilon=self.epsilon, dtype=self.dtype)
        if not self.is_initializing():
            for running, new in zip((mean, var), found, strict=True):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return out


class FrozenBatchNorm(nn.Module):
    """Batch norm that keeps the statistics, scale and bias it was given.

    out = (x - mean) / sqrt(var + epsilon) * scale + bias

    Detectors fine-tune with batches too small for statistics of their own. The
    variables are those of `BatchNorm`; weights fit both. No gradient reaches them.

    Attributes:
      epsilon: added to the variance.
      dtype: of the output; the statistics are applied in float32.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 2
    (arXiv:1502.03167); frozen as in He et al. 2017, "Mask R-CNN", section 3.1
    (arXiv:1703.06870).
    """

    epsilon: float = _EPSILON
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B C"], use_running_average: bool | None = None
    ) -> Float[Array, "*B C"]:
        """Returns x normalised by the stored statistics.

        Args:
          x: channels last.
          use_running_average: taken so that it stands where `BatchNorm` does;
            frozen, it is true whatever is passed.
        """
        del use_running_average
        mean, var, *affine = _variables(self, x, nn.initializers.ones)
        scale, bias = map(lax.stop_gradient, affine)
        return _by_running(x, mean.value, var.value, scale, bias, self.epsilon, self.dtype)


def _variables(module, x, scale_init):
    width = (x.shape[-1],)
    return (
        module.variable("batch_stats", "mean", jnp.zeros, width),
        module.variable("batch_stats", "var", jnp.ones, width),
        jnp.asarray(module.param("scale", scale_init, width)),
        jnp.asarray(module.param("bias", nn.initializers.zeros, width)),
    )


def _by_running(x, mean, var, scale, bias, epsilon, dtype):
    mean, var = lax.stop_gradient((mean, var))
    factor = scale * lax.rsqrt(var + epsilon)
    offset = bias - mean * factor
    return (x.astype(jnp.float32) * channels(factor, x) + channels(offset, x)).astype(dtype)


def batch_norm(
    norm: str,
    train: bool | None = None,
    dtype: Dtype = jnp.float32,
    name: str | None = None,
    *,
    scale_init: Initializer = nn.initializers.ones,
) -> nn.Module:
    """Makes the batch norm that a model's field `norm` names.

    Args:
      norm: "batch" is `BatchNorm`, "frozen" is `FrozenBatchNorm`.
      train: normalises by the batch and updates the running statistics; None
        leaves it to the call (`use_running_average=not train`), for `setup`.
      dtype: of the output; statistics are computed in float32.
      name: of the module; None inside `setup`.
      scale_init: of the scale; a frozen one starts at one.

    Returns:
      A linen module.

    Raises:
      ValueError: no such norm.
    """
    if norm == "batch":
        average = None if train is None else not train
        return BatchNorm(average, dtype=dtype, scale_init=scale_init, name=name)
    if norm == "frozen":
        return FrozenBatchNorm(dtype=dtype, name=name)
    raise ValueError(f'batch_norm: norm={norm!r} is neither "batch" nor "frozen"')
