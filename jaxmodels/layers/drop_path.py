"""Stochastic depth."""

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float


class DropPath(nn.Module):
    """Drops a residual branch for whole examples while training.

    out_b = x_b keep_b / (1 - rate),   keep_b ~ Bernoulli(1 - rate)

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", section 3
    (arXiv:1603.09382), with the branch scaled up in training instead of down
    in use.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *rest"], rate: float | Float[Array, ""], *, train: bool
    ) -> Float[Array, "B *rest"]:
        """Returns x, in training with some examples zero and the others scaled.

        Args:
          x: the branch, batch first.
          rate: probability of a drop, in [0, 1); exactly zero needs no key.
          train: draws from the stream "dropout".

        Raises:
          ValueError: a rate outside [0, 1).
        """
        if isinstance(rate, float | int):
            if not 0 <= rate < 1:
                raise ValueError(f"DropPath: rate={rate} is outside [0, 1)")
            if rate == 0:
                return x
        if not train:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (x.shape[0],))
        factor = (keep / (1 - rate)).astype(x.dtype)
        return x * factor.reshape(-1, *(1,) * (x.ndim - 1))


def drop_path_rates(last: float, depth: int) -> np.ndarray:
    """Rates of all blocks, growing linearly from 0 to `last`, as in section 3 of the paper."""
    return np.linspace(0.0, last, depth, dtype=np.float32)
