"""A plain decoder language model whose layers mix tokens by any registered mixer.

Paper    the block of Touvron et al. 2023, "LLaMA", section 2.2
         (arXiv:2302.13971): a norm before each half, RMSNorm, SwiGLU.
Differs  any mixer of `jaxmodels.list_mixers()` stands where attention does, and
         the embedding table is the output matrix too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from jaxmodels.layers.mlp import GatedMlp
from jaxmodels.registry import create_mixer


class DecoderBlock(nn.Module):
    """A mixer and a feed-forward, each added to what comes in and after a norm of it.

    Attributes:
      mixer: a sequence mixer.
      mlp_width: F, of the feed-forward.
      dtype: of the computation.
    """

    mixer: nn.Module
    mlp_width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """As a mixer: returns the tokens after this block and the mixer's state."""
        h = nn.RMSNorm(dtype=self.dtype, name="mixer_norm")(x)
        h, state = self.mixer(h, positions, segment_ids, state, train)
        x = x + h
        h = nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
        return x + GatedMlp(self.mlp_width, dtype=self.dtype, name="mlp")(h), state


class Decoder(nn.Module):
    """Tokens to the logits of the tokens that follow.

    Attributes:
      vocab_size: tokens are 0 to vocab_size - 1.
      width: D, of a token's vector.
      depth: number of blocks.
      mlp_width: F, of the feed-forwards; None is 8 / 3 of the width, rounded up to
        a multiple of 8.
      mixer: the name of every layer's mixer, or one name a layer.
      mixer_options: fields of every layer's mixer, or a mapping a layer.
      dtype: of the computation; parameters are float32.
    """

    width: int
    depth: int
    vocab_size: int = 256
    mlp_width: int | None = None
    mixer: str | Sequence[str] = "softmax"
    mixer_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] = FrozenDict()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Sequence[Any] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T E"], tuple[Any, ...] | None]:
        """Predicts the token after each one.

        Args:
          tokens: in [0, vocab_size).
          positions, segment_ids: as for a mixer (`jaxmodels.layers.mixers`).
          state: one value a layer, from `init_state` or the call before.
          train: passed on to the mixers.

        Returns:
          Logits in float32, and the new state, or None without one.

        Raises:
          ValueError: names, options or states are not one a layer; or as the mixers.
        """
        # Of variance 1 / D, because the table is also the output matrix.
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(self.width**-0.5),
            name="embed",
        )
        x = embed(tokens) * jnp.sqrt(self.width).astype(self.dtype)
        states = [None] * self.depth if state is None else self._a_layer("state", state)
        mlp_width = self.mlp_width or -(-self.width * 8 // 24) * 8
        after = []
        for i, mixer in enumerate(self._mixers()):
            block = DecoderBlock(mixer, mlp_width, dtype=self.dtype, name=f"block_{i}")
            x, new = block(x, positions, segment_ids, states[i], train)
            after.append(new)
        x = nn.RMSNorm(dtype=self.dtype, name="final_norm")(x)
        logits = embed.attend(x).astype(jnp.float32)
        return logits, None if state is None else tuple(after)

    # Linen would have mixers made here belong to a model that is not being applied.
    @nn.nowrap
    def init_state(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> tuple:
        """An empty state for sequences of at most `max_length` tokens, one value a layer."""
        return tuple(m.init_state(batch, max_length, dtype) for m in self._mixers())

    @nn.nowrap
    def _mixers(self) -> list[nn.Module]:
        names = [self.mixer] * self.depth if isinstance(self.mixer, str) else self.mixer
        options = self.mixer_options
        options = [options] * self.depth if isinstance(options, Mapping) else options
        pairs = zip(
            self._a_layer("mixer", names), self._a_layer("mixer_options", options), strict=True
        )
        # Without a parent, since a block is going to adopt them.
        return [create_mixer(n, **{"dtype": self.dtype, **o}).clone(parent=None) for n, o in pairs]

    def _a_layer(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        if len(values) != self.depth:
            raise ValueError(
                f"Decoder: {name} has {len(values)} entries for depth={self.depth}; "
                f"give one, or one a layer"
            )
        return values
