"""Position schemes that add a bias by distance to the logits.

Each has the method `attend` that `layers.positions` describes. KERPLE and T5
learn their biases and are linen modules; the others are plain values. A module
given to a mixer is part of it; given to several layers of a decoder, one module
is shared by them, as T5 shares its biases.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels import ops
from jaxmodels.ops import position_biases as biases

# Keeps KERPLE's parameters positive, as in its code.
_SMALLEST = 1e-2


@dataclasses.dataclass(frozen=True)
class Alibi:
    """A penalty linear in the distance, with a fixed slope a head.

    With causal=True, positions must not fall from one token of a document to the next.

    Source: Press et al. 2021, "Train Short, Test Long" (arXiv:2108.12409).
    """

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see `layers.positions` for the arguments."""
        slopes = biases.alibi_slopes(q.shape[2])
        if options.get("causal") and options.get("sinks") is None:
            # All keys are before the query, whose own place adds one number to all of
            # its logits. Softmax does not see that, so the bias is one of keys alone.
            bias = slopes[None, :, None] * (k_positions - jnp.max(k_positions))[:, None, :]
            return ops.dot_product_attention(q, k, v, bias=bias[:, :, None], **options)

        def bias(*positions):
            return biases.alibi_bias(biases.distances(*positions), slopes)

        return biases.biased_attention(q, k, v, q_positions, k_positions, bias, **options)


@dataclasses.dataclass(frozen=True)
class Sandwich:
    """The product of sinusoidal positions, compressed differently by each head.

    Attributes:
      width: of the sinusoidal positions, whatever that of the heads.

    Source: Chi et al. 2022, section 6 (arXiv:2212.10356).
    """

    width: int = 128

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see `layers.positions` for the arguments."""

        def bias(*positions):
            return biases.sandwich_bias(*positions, q.shape[2], width=self.width)

        return biases.biased_attention(q, k, v, q_positions, k_positions, bias, **options)


class Kerple(nn.Module):
    """A learned penalty, logarithmic in the distance or a power of it.

    Parameters `r1` and `r2`, one a head; they start uniform in [0, 2] and [0, 1]
    ("log"), or [0, 1] and [0, 2] ("power"), and are used clipped to at least
    0.01, and r2 of the power to at most 2.

    Attributes:
      kernel: "log" or "power".

    Source: Chi et al. 2022, "KERPLE" (arXiv:2205.09921), initialised as in its code.
    """

    kernel: str = "log"

    @nn.compact
    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see `layers.positions` for the arguments.

        Raises:
          ValueError: unknown kernel.
        """
        kernels = {
            "log": (biases.kerple_log_bias, 2.0, 1.0, None),
            "power": (biases.kerple_power_bias, 1.0, 2.0, 2.0),
        }
        if self.kernel not in kernels:
            raise ValueError(f"Kerple: kernel={self.kernel!r} is none of {tuple(kernels)}")
        function, high1, high2, most2 = kernels[self.kernel]
        heads = (q.shape[2],)
        r1 = jnp.clip(self.param("r1", nn.initializers.uniform(high1), heads), _SMALLEST)
        r2 = jnp.clip(self.param("r2", nn.initializers.uniform(high2), heads), _SMALLEST, most2)

        def bias(*positions):
            return function(biases.distances(*positions), r1, r2)

        return biases.biased_attention(q, k, v, q_positions, k_positions, bias, **options)


class T5Bias(nn.Module):
    """A learned bias for each bucket of distances and each head.

    The parameter `table` is (num_buckets, H). T5 itself takes logits unscaled
    (`scale=1.0` of the mixer).

    Attributes:
      bidirectional: gives half of the buckets to later keys.
      num_buckets, max_distance: as in `ops.position_biases.t5_buckets`.

    Source: Raffel et al. 2020, section 2.1 (arXiv:1910.10683).
    """

    bidirectional: bool = False
    num_buckets: int = 32
    max_distance: int = 128

    @nn.compact
    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see `layers.positions` for the arguments."""
        init = nn.initializers.normal(0.02)
        table = self.param("table", init, (self.num_buckets, q.shape[2]))

        def bias(*positions):
            buckets = biases.t5_buckets(
                biases.distances(*positions),
                bidirectional=self.bidirectional,
                num_buckets=self.num_buckets,
                max_distance=self.max_distance,
            )
            return jnp.moveaxis(table[buckets], -1, 1)

        return biases.biased_attention(q, k, v, q_positions, k_positions, bias, **options)
