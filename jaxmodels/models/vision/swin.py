"""Swin: a transformer in shifted windows, whose cost grows linearly with the area.

Paper    Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using
         Shifted Windows" (arXiv:2103.14030): section 3, the sizes of section 3.3.
Differs  Images of any size: padded to whole patches, and every map to whole
         windows, with zeros, as transformers does. A map no larger than a window
         is not shifted. Matrices start by Xavier's rule: the published deviation of
         0.02 suits wide networks, and hardly lets narrow ones learn.
Weights  transformers' `swin` (SwinModel, SwinForImageClassification), both ways,
         by `jaxmodels.load_pretrained` and `jaxmodels.save_pretrained`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from jaxmodels.layers.drop_path import DropPath, drop_path_rates
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.layers.patch_embed import PatchEmbed
from jaxmodels.layers.repeated_blocks import require_policy, run_in_turn
from jaxmodels.models.vision.checks import require_images
from jaxmodels.models.vision.feed_forward import FeedForward
from jaxmodels.ops.shifted_windows import map_windows, relative_places
from jaxmodels.registry import register_model

_INIT = nn.initializers.truncated_normal(0.02)


def attend_in_windows(
    q: Float[Array, "B N T H K"],
    k: Float[Array, "B N T H K"],
    v: Float[Array, "B N T H K"],
    bias: Float[Array, "H T T"],
    mask: Bool[Array, "N T T"] | None,
) -> Float[Array, "B N T D"]:
    """Softmax attention inside each window; q holds the scale, the logits are float32.

    Windows are many and small: two batched products beat `dot_product_attention`,
    which is made for few long sequences.
    """
    logits = jnp.einsum("bnthk,bnshk->bnhts", q, k, preferred_element_type=jnp.float32)
    logits = logits + bias[None, None]
    if mask is not None:
        logits = jnp.where(mask[None, :, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bnhts,bnshk->bnthk", weights, v)
    return out.reshape(*out.shape[:3], -1)


class WindowAttention(nn.Module):
    """Self-attention in windows with a learned bias for each offset (equation 4).

    Attributes:
      num_heads: divides the width.
      window: side of a window.
      dtype: of the computation.
    """

    num_heads: int
    window: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N T D"], mask: Bool[Array, "N T T"] | None
    ) -> Float[Array, "B N T D"]:
        """Mixes the pixels of each window; `mask` is true where one may see another."""
        width = x.shape[-1]
        q, k, v = (
            Linear(width, dtype=self.dtype, name=name)(x).reshape(
                *x.shape[:-1], self.num_heads, width // self.num_heads
            )
            for name in "qkv"
        )
        offsets = (2 * self.window - 1) ** 2
        table = self.param("position_bias", _INIT, (offsets, self.num_heads))
        bias = jnp.moveaxis(table[relative_places(self.window)], -1, 0)
        out = attend_in_windows(q * (width // self.num_heads) ** -0.5, k, v, bias, mask)
        return Linear(width, dtype=self.dtype, name="out")(out)


class SwinBlock(nn.Module):
    """Attention in windows and feed-forward, each after a norm (figure 3b).

    Attributes:
      num_heads, window: of the attention.
      shift: of the windows, in pixels.
      hidden_width: of the feed-forward.
      drop_path: probability that a branch is dropped in training.
      dtype: of the computation.
    """

    num_heads: int
    window: int
    shift: int
    hidden_width: int
    drop_path: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X C"]:
        """Returns the map after this block."""
        shift = self.shift if min(x.shape[1:3]) > self.window else 0
        attention = WindowAttention(self.num_heads, self.window, self.dtype, name="attention")
        h = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="attention_norm")(x)
        h = map_windows(attention, h, self.window, shift)
        x = x + DropPath()(h, self.drop_path, train=train)
        h = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        mlp = FeedForward(self.hidden_width, dtype=self.dtype, name="mlp")
        return x + DropPath()(mlp(h), self.drop_path, train=train)


def neighbours(x: Float[Array, "B Y X C"]) -> Float[Array, "B V U 4*C"]:
    """Joins each 2 x 2 pixels, column by column, after padding to even sides."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = x.transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


class PatchMerging(nn.Module):
    """Halves the sides and doubles the channels: join, norm, linear map (section 3.1).

    Attributes:
      dtype: of the computation.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U 2*C"]:
        """Returns the smaller map; odd sides are padded with zeros."""
        h = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(neighbours(x))
        return Linear(2 * x.shape[-1], use_bias=False, dtype=self.dtype, name="reduce")(h)


class SwinTransformer(nn.Module):
    """Swin Transformer for images of any size from one window up.

    Attributes:
      width: channels of the first stage; each stage doubles them.
      depths: blocks of each stage; every second one is shifted.
      num_heads: of each stage.
      window: side of a window, in patches.
      patch_size: side of a patch in pixels.
      in_channels: of the images.
      num_classes: logits; 0 makes the call return the pooled features.
      mlp_ratio: hidden width of the feed-forward over width.
      dropout: after the patch embedding.
      drop_path: stochastic depth of the last block, from 0 in the first.
      remat: what the backward pass computes again, a policy of
        `ops.rematerialisation`, a stage by itself; on CPUs after `cpu.tune()` (see `run_in_turn`).
      dtype: of the computation; parameters are float32.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    patch_size: int = 4
    in_channels: int = 3
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.1
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, in the order of figure 3a."""
        self._check()
        self.patch_embed = PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
        self.patch_norm = LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths)).tolist())
        self.stages = [
            [self._block(stage, block, next(rates)) for block in range(depth)]
            for stage, depth in enumerate(self.depths)
        ]
        self.merges = [self._merge() for _ in self.depths[1:]]
        self.norm = LayerNorm(epsilon=1e-5, dtype=self.dtype)
        if self.num_classes:
            self.head = Linear(self.num_classes, dtype=self.dtype, kernel_init=_INIT)

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in each map of `features`."""
        return {f"C{i + 2}": self.patch_size * 2**i for i in range(len(self.depths))}

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B classes"]:
        """Classifies images.

        Args:
          images: of any size from one window of the first stage up.
          train: dropout and stochastic depth, by `rngs={"dropout": key}`.

        Returns:
          Logits, or the pooled features if num_classes is 0, in `dtype`.

        Raises:
          ValueError: fields contradict each other, or images are not what they say.
        """
        *_, last = self.features(images, train=train).values()
        x = last.mean(axis=(1, 2))
        return self.head(x) if self.num_classes else x

    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The maps of all stages before merging, "C2" to "C5", the last one normalised."""
        side = self.patch_size * self.window
        require_images(type(self).__name__, images, self.in_channels, side, "window")
        down, right = (-n % self.patch_size for n in images.shape[1:3])
        images = jnp.pad(images, ((0, 0), (0, down), (0, right), (0, 0)))
        rows, columns = (n // self.patch_size for n in images.shape[1:3])
        x = self.patch_norm(self.patch_embed(images))
        x = self.drop(x, deterministic=not train).reshape(-1, rows, columns, self.width)
        maps = {}
        for i, blocks in enumerate(self.stages):
            x = self.merges[i - 1](x) if i else x

            def run(model, block, x, stage=i):
                return model.stages[stage][block](x, train=train)

            last = i == len(self.depths) - 1
            x = run_in_turn(run, self, x, len(blocks), self.remat, last=last)
            maps[f"C{i + 2}"] = x
        *_, last = maps
        return {**maps, last: self.norm(x)}

    def _block(self, stage: int, block: int, drop_path: float) -> nn.Module:
        width = self.width * 2**stage
        return SwinBlock(
            self.num_heads[stage],
            self.window,
            shift=self.window // 2 * (block % 2),
            hidden_width=int(self.mlp_ratio * width),
            drop_path=drop_path,
            dtype=self.dtype,
        )

    def _merge(self) -> nn.Module:
        return PatchMerging(self.dtype)

    def _check(self) -> None:
        name = type(self).__name__
        require_policy(name, self.remat)
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"{name}: depths={self.depths} and num_heads={self.num_heads} differ in length"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.width * 2**stage % heads:
                raise ValueError(
                    f"{name}: num_heads={heads} does not divide the width "
                    f"{self.width * 2**stage} of stage {stage + 1}"
                )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"{name}: drop_path={self.drop_path} is outside [0, 1)")


SIZES = {
    "tiny": {"width": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"width": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"width": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


@register_model
def swin_tiny_patch4_window7_224(**overrides) -> SwinTransformer:
    """Swin-T for 1000 classes."""
    return SwinTransformer(**{**SIZES["tiny"], **overrides})


@register_model
def swin_small_patch4_window7_224(**overrides) -> SwinTransformer:
    """Swin-S for 1000 classes."""
    return SwinTransformer(**{**SIZES["small"], **overrides})


@register_model
def swin_base_patch4_window7_224(**overrides) -> SwinTransformer:
    """Swin-B for 1000 classes."""
    return SwinTransformer(**{**SIZES["base"], **overrides})


@register_model
def swin_large_patch4_window7_224(**overrides) -> SwinTransformer:
    """Swin-L for 1000 classes."""
    return SwinTransformer(**{**SIZES["large"], **overrides})


@register_model
def swin_base_patch4_window12_384(**overrides) -> SwinTransformer:
    """Swin-B with windows of 12 x 12 patches for 1000 classes."""
    return SwinTransformer(**{**SIZES["base"], "window": 12, **overrides})


@register_model
def swin_large_patch4_window12_384(**overrides) -> SwinTransformer:
    """Swin-L with windows of 12 x 12 patches for 1000 classes."""
    return SwinTransformer(**{**SIZES["large"], "window": 12, **overrides})
