"""A plain decoder language model whose layers mix tokens by any registered mixer.

Paper    the block of Touvron et al. 2023, "LLaMA", section 2.2
         (arXiv:2302.13971): a norm before each half, RMSNorm, SwiGLU.
Differs  any mixer of `jaxmodels.list_mixers()` stands where attention does, and
         the embedding table is the output matrix too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from jaxmodels.layers.mixers.cache import KVCache, RollingCache, tokens_seen
from jaxmodels.layers.mixers.inputs import token_positions
from jaxmodels.layers.mlp import GatedMlp
from jaxmodels.layers.position_embeddings import LearnedPositions, SinusoidalPositions
from jaxmodels.models.language.language_model import DecoderBlock, LanguageModel, make_norm
from jaxmodels.registry import create_mixer


class Decoder(LanguageModel):
    """Tokens to the logits of the tokens that follow.

    Attributes:
      vocab_size: tokens are 0 to vocab_size - 1.
      width: D, of a token's vector.
      depth: number of blocks.
      mlp_width: F, of the feed-forwards; None is 8 / 3 of the width, rounded up to
        a multiple of 8.
      mixer: the name of every layer's mixer, or one name a layer.
      mixer_options: fields of every layer's mixer, or a mapping a layer.
      position_embedding: "learned" (for `context` places; NaN beyond) or "sinusoidal"
        vectors are added to the tokens'; None leaves positions to the mixers. A model
        that has them streams with caches, or with positions given.
      context: the longest sequence it is meant for; None sets no limit.
      remat, scan: see `LanguageModel`.
      dtype: of the computation; parameters are float32.
    """

    width: int
    depth: int
    vocab_size: int = 256
    mlp_width: int | None = None
    mixer: str | Sequence[str] = "softmax"
    mixer_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] = FrozenDict()
    position_embedding: str | None = None
    context: int | None = None
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32

    def __post_init__(self):
        # A model is a value that compiled functions take as a constant, so it is hashable.
        options = self.mixer_options
        one = isinstance(options, Mapping)
        options = FrozenDict(options) if one else tuple(map(FrozenDict, options))
        object.__setattr__(self, "mixer_options", options)
        if not isinstance(self.mixer, str):
            object.__setattr__(self, "mixer", tuple(self.mixer))
        super().__post_init__()

    def setup(self):
        """Makes the parts."""
        # Of variance 1 / D, because the table is also the output matrix.
        init = nn.initializers.normal(self.width**-0.5)
        self.embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=init)
        self.place = self._place()
        mlp_width = self.mlp_width or -(-self.width * 8 // 24) * 8
        self.block = [
            DecoderBlock(mixer, GatedMlp(mlp_width, dtype=self.dtype), dtype=self.dtype)
            for mixer in self.mixers()
        ]
        self.final_norm = make_norm("rms", 1e-6, self.dtype)
        self.head = None

    def embedded(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        state: Sequence[Any] | None,
    ) -> Float[Array, "B T D"]:
        """The rows of the table, made of variance one, and the vectors of their positions."""
        x = self.embed(tokens) * jnp.sqrt(self.width).astype(self.dtype)
        if self.place is None:
            return x
        seen = None
        if state is not None and positions is None:
            if not isinstance(state[0], KVCache | RollingCache):
                raise ValueError(
                    f"Decoder: the state {type(state[0]).__name__} of mixer={self.mixer!r} does "
                    f"not say where position_embedding={self.position_embedding!r} goes on; pass "
                    f"positions"
                )
            seen = tokens_seen(state[0])
        return x + self.place(token_positions(x, positions, segment_ids, seen))

    @nn.nowrap
    def _place(self) -> Callable[[Int[Array, "B T"]], Float[Array, "B T D"]] | None:
        if self.position_embedding is None:
            return None
        if self.position_embedding == "sinusoidal":
            return SinusoidalPositions(self.width, dtype=self.dtype)
        if self.position_embedding != "learned":
            raise ValueError(
                f"Decoder: position_embedding={self.position_embedding!r} is none of "
                f'"learned", "sinusoidal", None'
            )
        if self.context is None:
            raise ValueError(
                'Decoder: position_embedding="learned" needs context, how many places to learn'
            )
        return LearnedPositions(self.context, self.width, dtype=self.dtype)

    @nn.nowrap
    def mixers(self) -> list[nn.Module]:
        """A mixer a layer, of no parent.

        Raises:
          ValueError: names or options are not one a layer, or unknown.
        """
        names = [self.mixer] * self.depth if isinstance(self.mixer, str) else self.mixer
        options = self.mixer_options
        options = [options] * self.depth if isinstance(options, Mapping) else options
        pairs = zip(
            self._a_layer("mixer", names), self._a_layer("mixer_options", options), strict=True
        )
        return [create_mixer(n, **{"dtype": self.dtype, **o}).clone(parent=None) for n, o in pairs]
