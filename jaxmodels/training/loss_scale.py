"""A factor that keeps the small gradients of float16, found while training.

float16 has five bits of exponent: below 2^-24 a number is zero, above 65504
infinite. Gradients lie low in that range, so the loss is multiplied by a power
of two before the backward pass and the gradients are divided by it after, in
float32. A gradient that is then not finite says that the factor was too large.

Written here, because `flax.training.dynamic_scale` takes the gradient itself:
it could scale only one part of an accumulated batch, and it counts nothing.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The largest that float16 itself holds, for a loss in float16 hands it on as its gradient.
INITIAL = 2.0**15
# Below it the factor would itself lose digits in float16, and what overflows still is no
# matter of scaling: `fit` stops there.
MINIMUM = 2.0**-14
# A loss without gradients doubles for ever; this is far from float32's infinity.
MAXIMUM = 2.0**32


@flax.struct.dataclass
class LossScale:
    """The factor and what decides its next value.

    Attributes:
      value: what the loss is multiplied by, a power of two, so that scaling alone
        rounds nothing.
      good_steps: steps since the factor last changed, all of them finite.
      skipped: steps that were skipped so far.
      growth_interval: how many finite steps double the factor; static.
    """

    # Any, because trees of shapes and of shardings have this structure too.
    value: Any
    good_steps: Any
    skipped: Any
    growth_interval: int = flax.struct.field(pytree_node=False, default=2000)

    def scaled(self, loss: Float[Array, ""]) -> Float[Array, ""]:
        """The loss to differentiate."""
        return loss * self.value

    def unscaled(self, grads: Any) -> Any:
        """The gradients of the loss itself, from float32 gradients of the scaled one."""
        return jax.tree.map(lambda g: g / self.value, grads)

    def after(self, finite: Bool[Array, ""]) -> "LossScale":
        """What the next step uses.

        value' = value / 2 after an overflow, 2 value after `growth_interval` finite steps

        Args:
          finite: whether this step's loss and gradients were.

        Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv:1710.03740),
        section 3.2.
        """
        good_steps: Int[Array, ""] = jnp.where(finite, self.good_steps + 1, 0)
        grows = good_steps >= self.growth_interval
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return self.replace(
            value=jnp.clip(self.value * factor, MINIMUM, MAXIMUM),
            good_steps=jnp.where(grows, 0, good_steps),
            skipped=self.skipped + ~finite,
        )


def initial_loss_scale(value: float = INITIAL, *, growth_interval: int = 2000) -> LossScale:
    """A loss scale before the first step.

    Args:
      value: a power of two from `MINIMUM` to `MAXIMUM`.
      growth_interval: at least 1.

    Raises:
      ValueError: either is not so.
    """
    if not MINIMUM <= value <= MAXIMUM or math.frexp(value)[0] != 0.5:
        raise ValueError(
            f"initial_loss_scale: value={value} must be a power of two from {MINIMUM} to {MAXIMUM}"
        )
    if growth_interval < 1:
        raise ValueError(
            f"initial_loss_scale: growth_interval={growth_interval} must be at least 1"
        )
    zero = jnp.zeros((), jnp.int32)
    # Distinct buffers: step donates each.
    return LossScale(
        jnp.asarray(value, jnp.float32), zero, jnp.copy(zero), growth_interval=growth_interval
    )
