"""One block of a Vision Transformer."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.attention import Attention
from jaxmodels.layers.drop_path import DropPath
from jaxmodels.models.vision.feed_forward import FeedForward
from jaxmodels.registry import create_mixer, module_fields


class ViTBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input (figure 1).

    Attributes: as of `VisionTransformer`.
    """

    num_heads: int
    hidden_width: int
    gated_mlp: bool = False
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    dropout: float = 0.0
    mixer: str | None = None
    mixer_options: Mapping[str, Any] = FrozenDict()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], drop_rate: float | Float[Array, ""], *, train: bool
    ) -> Float[Array, "B T D"]:
        """Returns the tokens after this block; `drop_rate` is that of its residual branches."""
        mlp = FeedForward(self.hidden_width, self.gated_mlp, dtype=self.dtype, name="mlp")
        for half, branch in (("attention", self._mix), ("mlp", mlp)):
            norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=f"{half}_norm")
            h = nn.Dropout(self.dropout)(branch(norm(x)), deterministic=not train)
            if self.layer_scale is not None:
                start = nn.initializers.constant(self.layer_scale)
                scale = self.param(f"{half}_scale", start, x.shape[-1:])
                h = h * scale.astype(self.dtype)[None, None, :]
            x = x + DropPath(name=f"{half}_drop")(h, drop_rate, train=train)
        return x

    def _mix(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.mixer is None:
            return Attention(self.num_heads, dtype=self.dtype, name="attention")(x)
        heads = {"num_heads": self.num_heads, "head_dim": x.shape[-1] // self.num_heads}
        fields = module_fields(create_mixer(self.mixer).clone(parent=None))
        heads = {field: value for field, value in heads.items() if field in fields}
        options = {"causal": False, "dtype": self.dtype, **heads, **self.mixer_options}
        mixer = create_mixer(self.mixer, **options).clone(parent=self, name="mixer")
        return mixer(x)[0]
