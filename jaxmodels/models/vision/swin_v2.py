"""Swin v2: Swin with cosine attention, norms after the branches and a continuous position bias.

Paper    Liu et al. 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution"
         (arXiv:2111.09883): sections 3.2 and 3.3, the sizes of section 4.1.
Differs  Images of any size and initial weights, as `swin.py`. Windows are those of `image_size`: no
         larger than its maps, and not shifted where one window covers a map.
         The extra norms of the largest networks are left out, as in transformers.
Weights  transformers' `swinv2` (Swinv2Model, Swinv2ForImageClassification), both
         ways, by `jaxmodels.load_pretrained` and `jaxmodels.save_pretrained`.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxmodels.layers.drop_path import DropPath
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.models.vision.feed_forward import FeedForward
from jaxmodels.models.vision.swin import (
    SIZES,
    SwinTransformer,
    attend_in_windows,
    neighbours,
)
from jaxmodels.ops.shifted_windows import map_windows, relative_places
from jaxmodels.registry import register_model

# Logits are cosines over a temperature of at least 0.01 (section 3.2).
_LARGEST_SCALE = math.log(100.0)
# The bias of a pair of pixels is 16 sigmoid(table), as published.
_BIAS_RANGE = 16.0


def log_offsets(window: int, trained_window: int) -> Float[np.ndarray, "P 2"]:
    """Log-spaced coordinates of all offsets of a window (equation 4).

    sign(d) log2(1 + 8 |d| / (trained - 1)) / log2(8),   d in (-window, window)^2

    Args:
      window: side of a window.
      trained_window: side of the windows of the pretraining; 0 is the same.
    """
    side = np.arange(-(window - 1), window, dtype=np.float64)
    side = 8 * side / max((trained_window or window) - 1, 1)
    side = np.sign(side) * np.log2(1 + np.abs(side)) / np.log2(8)
    pairs = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)
    return pairs.reshape(-1, 2).astype(np.float32)


class CosineWindowAttention(nn.Module):
    """Self-attention in windows by scaled cosines (equations 2 to 4).

    Attributes:
      num_heads: divides the width.
      window: side of a window.
      trained_window: side of the windows of the pretraining; 0 is the same.
      dtype: of the computation.
    """

    num_heads: int
    window: int
    trained_window: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N T D"], mask: Bool[Array, "N T T"] | None
    ) -> Float[Array, "B N T D"]:
        """Mixes the pixels of each window; `mask` is true where one may see another."""
        width = x.shape[-1]
        q, k, v = (
            Linear(width, name != "k", dtype=self.dtype, name=name)(x).reshape(
                *x.shape[:-1], self.num_heads, width // self.num_heads
            )
            for name in "qkv"
        )
        start = nn.initializers.constant(math.log(10.0))
        scale = self.param("logit_scale", start, (self.num_heads,))
        scale = jnp.exp(jnp.minimum(scale, _LARGEST_SCALE))[:, None]
        q, k = _unit(q) * scale[None, None, None], _unit(k)
        q, k = q.astype(self.dtype), k.astype(self.dtype)
        out = attend_in_windows(q, k, v, self._position_bias(), mask)
        return Linear(width, dtype=self.dtype, name="out")(out)

    def _position_bias(self) -> Float[Array, "H T T"]:
        offsets = jnp.asarray(log_offsets(self.window, self.trained_window))
        h = nn.relu(Linear(512, name="position_up")(offsets))
        table = Linear(self.num_heads, use_bias=False, name="position_down")(h)
        bias = table[relative_places(self.window)]
        return jnp.moveaxis(_BIAS_RANGE * nn.sigmoid(bias), -1, 0)


def _unit(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """x over its length, in float32; zeros (the keys of padding) stay zeros."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(square, 1e-24))


class SwinV2Block(nn.Module):
    """Attention in windows and feed-forward, each before a norm (figure 1).

    Attributes: as of `swin.SwinBlock`, and
      trained_window: of the attention.
    """

    num_heads: int
    window: int
    shift: int
    hidden_width: int
    trained_window: int = 0
    drop_path: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X C"]:
        """Returns the map after this block."""
        attention = CosineWindowAttention(
            self.num_heads, self.window, self.trained_window, self.dtype, name="attention"
        )
        h = map_windows(attention, x, self.window, self.shift)
        h = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="attention_norm")(h)
        x = x + DropPath()(h, self.drop_path, train=train)
        mlp = FeedForward(self.hidden_width, dtype=self.dtype, name="mlp")
        h = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(mlp(x))
        return x + DropPath()(h, self.drop_path, train=train)


class PatchMergingV2(nn.Module):
    """As `swin.PatchMerging`, with the norm after the linear map.

    Attributes:
      dtype: of the computation.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U 2*C"]:
        """Returns the smaller map; odd sides are padded with zeros."""
        h = Linear(2 * x.shape[-1], use_bias=False, dtype=self.dtype, name="reduce")(neighbours(x))
        return LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(h)


class SwinTransformerV2(SwinTransformer):
    """Swin Transformer v2 for images of any size from one window up.

    Attributes, beyond those of `SwinTransformer`:
      image_size: side of the images that decides windows and shifts of the
        stages; a larger image is cut into the same windows.
      trained_windows: windows of each stage in pretraining, where they were
        others; 0 is the same.
    """

    window: int = 8
    image_size: int = 256
    trained_windows: tuple[int, ...] = (0, 0, 0, 0)

    def _block(self, stage: int, block: int, drop_path: float) -> nn.Module:
        side = self.image_size // self.patch_size // 2**stage
        window = min(side, self.window)
        width = self.width * 2**stage
        return SwinV2Block(
            self.num_heads[stage],
            window,
            shift=self.window // 2 * (block % 2) if side > window else 0,
            hidden_width=int(self.mlp_ratio * width),
            trained_window=self.trained_windows[stage],
            drop_path=drop_path,
            dtype=self.dtype,
        )

    def _merge(self) -> nn.Module:
        return PatchMergingV2(self.dtype)

    def _check(self) -> None:
        super()._check()
        smallest = self.image_size // self.patch_size // 2 ** (len(self.depths) - 1)
        if smallest < 1:
            raise ValueError(
                f"SwinTransformerV2: image_size={self.image_size} leaves no pixel to the last of "
                f"{len(self.depths)} stages"
            )
        if len(self.trained_windows) < len(self.depths):
            raise ValueError(
                f"SwinTransformerV2: trained_windows={self.trained_windows} must have one window "
                f"for each of {len(self.depths)} stages"
            )


def _published(size: str, fields: dict, overrides: dict) -> SwinTransformerV2:
    return SwinTransformerV2(**{**SIZES[size], **fields, **overrides})


# Windows of 12 at 192 pixels, tuned with windows of 16 at 256.
_TUNED = {"window": 16, "trained_windows": (12, 12, 12, 6)}


@register_model
def swinv2_tiny_patch4_window8_256(**overrides) -> SwinTransformerV2:
    """SwinV2-T with windows of 8 x 8 patches for 1000 classes."""
    return _published("tiny", {"window": 8}, overrides)


@register_model
def swinv2_tiny_patch4_window16_256(**overrides) -> SwinTransformerV2:
    """SwinV2-T with windows of 16 x 16 patches for 1000 classes."""
    return _published("tiny", {"window": 16}, overrides)


@register_model
def swinv2_small_patch4_window8_256(**overrides) -> SwinTransformerV2:
    """SwinV2-S with windows of 8 x 8 patches for 1000 classes."""
    return _published("small", {"window": 8}, overrides)


@register_model
def swinv2_small_patch4_window16_256(**overrides) -> SwinTransformerV2:
    """SwinV2-S with windows of 16 x 16 patches for 1000 classes."""
    return _published("small", {"window": 16}, overrides)


@register_model
def swinv2_base_patch4_window8_256(**overrides) -> SwinTransformerV2:
    """SwinV2-B with windows of 8 x 8 patches for 1000 classes."""
    return _published("base", {"window": 8}, overrides)


@register_model
def swinv2_base_patch4_window16_256(**overrides) -> SwinTransformerV2:
    """SwinV2-B with windows of 16 x 16 patches for 1000 classes."""
    return _published("base", {"window": 16}, overrides)


@register_model
def swinv2_base_patch4_window12to16_192to256(**overrides) -> SwinTransformerV2:
    """SwinV2-B, pretrained with windows of 12 x 12 and tuned with 16 x 16."""
    return _published("base", _TUNED, overrides)


@register_model
def swinv2_large_patch4_window12to16_192to256(**overrides) -> SwinTransformerV2:
    """SwinV2-L, pretrained with windows of 12 x 12 and tuned with 16 x 16."""
    return _published("large", _TUNED, overrides)
