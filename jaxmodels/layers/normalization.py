"""Batch normalisation, alive or frozen, by name."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

_EPSILON = 1e-5


class FrozenBatchNorm(nn.Module):
    """Batch norm that keeps the statistics, scale and bias it was given.

    out = (x - mean) / sqrt(var + epsilon) * scale + bias

    Detectors fine-tune with batches too small for statistics of their own. The
    variables are those of `nn.BatchNorm`: "scale" and "bias" in "params", "mean"
    and "var" in "batch_stats"; weights fit both. No gradient reaches them.

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
          use_running_average: taken so that it stands where `nn.BatchNorm` does;
            frozen, it is true whatever is passed.
        """
        del use_running_average
        width = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width).value
        var = self.variable("batch_stats", "var", jnp.ones, width).value
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        factor = scale * lax.rsqrt(var + self.epsilon)
        offset = bias - mean * factor
        factor, offset = (
            jnp.expand_dims(lax.stop_gradient(v), range(x.ndim - 1)) for v in (factor, offset)
        )
        return (x.astype(jnp.float32) * factor + offset).astype(self.dtype)


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
      norm: "batch" is `nn.BatchNorm` with momentum 0.9 and epsilon 1e-5, "frozen"
        is `FrozenBatchNorm`.
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
        return nn.BatchNorm(
            use_running_average=average,
            momentum=0.9,
            epsilon=_EPSILON,
            dtype=dtype,
            scale_init=scale_init,
            name=name,
        )
    if norm == "frozen":
        return FrozenBatchNorm(dtype=dtype, name=name)
    raise ValueError(f'batch_norm: norm={norm!r} is neither "batch" nor "frozen"')
