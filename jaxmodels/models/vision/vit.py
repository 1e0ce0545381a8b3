"""ViT: a transformer over the patches of an image.

Paper    Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for
         Image Recognition at Scale" (arXiv:2010.11929): section 3.1, the sizes of
         table 1, Ti and S of Steiner et al. 2022 (arXiv:2106.10270); positions
         for other resolutions as in section 3.2, by bicubic interpolation.
         Heads: class token; mean of the patches (Beyer et al. 2022,
         arXiv:2205.01580); attention pooling (Zhai et al. 2022, arXiv:2106.04560).
Differs  The weights of all blocks are stacked along a leading axis of length
         `depth`. Layer scale, SwiGLU, registers and the mask token are those of
         DINOv2 (`dinov2.py`).
Weights  transformers' `vit` (ViTModel, ViTForImageClassification) and `dinov2`,
         both ways, by `jaxmodels.load_pretrained` and `jaxmodels.save_pretrained`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from jaxmodels.layers.attention_pool import AttentionPool
from jaxmodels.layers.drop_path import drop_path_rates
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.patch_embed import PatchEmbed
from jaxmodels.layers.repeated_blocks import require_policy, run_stacked
from jaxmodels.models.vision.checks import require_images
from jaxmodels.models.vision.vit_block import ViTBlock
from jaxmodels.ops.resize import resize
from jaxmodels.registry import register_model

# How tokens become one vector, and whether there is a class token.
_POOLS = {"token": True, "token_and_mean": True, "mean": False, "attention": False}


class VisionTransformer(nn.Module):
    """Vision Transformer for images of any size.

    Attributes:
      width: of a token; a multiple of num_heads.
      depth: number of blocks.
      num_heads: of each attention.
      image_size: side of the square image that the learned positions are for;
        they are interpolated for images of another size.
      patch_size: side of a patch in pixels.
      in_channels: of the images.
      num_classes: logits; 0 makes the call return the pooled features.
      pool: "token" is the class token; "mean" the mean of the patches;
        "attention" a learned query; "token_and_mean" the first two, concatenated.
      pooler: a linear map and tanh between pool and head, as BERT's.
      hidden_width: of the feed-forward; None is four times the width.
      gated_mlp: SwiGLU instead of GELU.
      layer_scale: initial factor on each residual branch; None is without.
      num_registers: extra tokens, without position, that are thrown away.
      mask_token: learns a token for patches that the call hides.
      norm_eps: epsilon of all norms.
      dropout: after the positions and both halves of a block.
      drop_path: stochastic depth of the last block, from 0 in the first.
      mixer: None is attention as published; the name of any bidirectional
        sequence mixer puts that in its place, with this model's heads.
      mixer_options: fields of the mixer.
      remat: what the backward pass computes again, a policy of
        `ops.rematerialisation`.
      dtype: of the computation; parameters are float32.
    """

    width: int
    depth: int
    num_heads: int
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    pool: str = "token"
    pooler: bool = False
    hidden_width: int | None = None
    gated_mlp: bool = False
    layer_scale: float | None = None
    num_registers: int = 0
    mask_token: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    mixer: str | None = None
    mixer_options: Mapping[str, Any] = FrozenDict()
    remat: str = "dots"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, in the order of figure 1."""
        self._check()
        small = nn.initializers.truncated_normal(0.02)
        self.patch_embed = PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
        places = (self.image_size // self.patch_size) ** 2 + _POOLS[self.pool]
        self.positions = self.param("positions", small, (places, self.width))
        if _POOLS[self.pool]:
            self.class_token = self.param("class_token", small, (self.width,))
        if self.num_registers:
            self.registers = self.param("registers", small, (self.num_registers, self.width))
        if self.mask_token:
            self.mask = self.param("mask", nn.initializers.zeros, (self.width,))
        self.drop = nn.Dropout(self.dropout)
        self.blocks = ViTBlock(
            self.num_heads,
            self.hidden_width or 4 * self.width,
            self.gated_mlp,
            self.layer_scale,
            self.norm_eps,
            self.dropout,
            self.mixer,
            self.mixer_options,
            dtype=self.dtype,
        )
        self.norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
        if self.pool == "attention":
            self.attention_pool = AttentionPool(
                self.num_heads, norm_eps=self.norm_eps, dtype=self.dtype
            )
        if self.pooler:
            self.pool_projection = Linear(self.width, dtype=self.dtype)
        if self.num_classes:
            self.head = Linear(self.num_classes, dtype=self.dtype, kernel_init=small)

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in each map of `features`."""
        return {"tokens": self.patch_size}

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        *,
        masked: Bool[Array, "B N"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B classes"]:
        """Classifies images.

        Args:
          images: of any size; rows and columns beyond the last whole patch are
            not seen, as by a convolution of this stride.
          masked: patches to hide behind the mask token, row by row.
          train: dropout and stochastic depth, by `rngs={"dropout": key}`.

        Returns:
          Logits, or the pooled features if num_classes is 0, in `dtype`.

        Raises:
          ValueError: fields contradict each other, or images are not what they say.
        """
        tokens, _ = self._tokens(images, masked, train)
        x = self._pooled(tokens)
        if self.pooler:
            x = jnp.tanh(self.pool_projection(x))
        return self.head(x) if self.num_classes else x

    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The normalised patches of the last block, as one map "tokens"; raises as the call."""
        tokens, (rows, columns) = self._tokens(images, None, train)
        patches = tokens[:, tokens.shape[1] - rows * columns :]
        return {"tokens": patches.reshape(-1, rows, columns, self.width)}

    def _pooled(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B F"]:
        patches = tokens[:, _POOLS[self.pool] + self.num_registers :]
        if self.pool == "attention":
            return self.attention_pool(patches)
        if self.pool == "mean":
            return patches.mean(axis=1)
        if self.pool == "token":
            return tokens[:, 0]
        return jnp.concatenate([tokens[:, 0], patches.mean(axis=1)], axis=-1)

    def _tokens(
        self, images: Float[Array, "B Y X C"], masked: Bool[Array, "B N"] | None, train: bool
    ) -> tuple[Float[Array, "B T D"], tuple[int, int]]:
        """All tokens after the last norm, class token and registers first, and the grid."""
        require_images("VisionTransformer", images, self.in_channels, self.patch_size, "patch")
        rows, columns = (side // self.patch_size for side in images.shape[1:3])
        whole = images[:, : rows * self.patch_size, : columns * self.patch_size]
        x = self.patch_embed(whole)
        if masked is not None:
            x = self._hide(x, masked)
        x = x + self._patch_positions(rows, columns).astype(self.dtype)[None]
        if _POOLS[self.pool]:
            x = self._prepend((self.class_token + self.positions[0])[None], x)
        x = self.drop(x, deterministic=not train)
        if self.num_registers:
            x = self._insert_registers(x)
        return self.norm(self._run_blocks(x, train)), (rows, columns)

    def _prepend(self, tokens: Float[Array, "R D"], x: Float[Array, "B T D"]) -> Array:
        tokens = jnp.broadcast_to(tokens.astype(self.dtype)[None], (len(x), *tokens.shape))
        return jnp.concatenate([tokens, x], axis=1)

    def _insert_registers(self, x: Float[Array, "B T D"]) -> Float[Array, "B U D"]:
        """Registers stand between the class token and the patches, as published."""
        first = int(_POOLS[self.pool])
        rest = self._prepend(self.registers, x[:, first:])
        return jnp.concatenate([x[:, :first], rest], axis=1)

    def _hide(self, x: Float[Array, "B N D"], masked: Bool[Array, "B M"]) -> Array:
        if not self.mask_token:
            raise ValueError("VisionTransformer: masked needs the field mask_token=True")
        if masked.shape != x.shape[:2]:
            raise ValueError(
                f"VisionTransformer: masked {masked.shape} must be (batch, patches) = {x.shape[:2]}"
            )
        return jnp.where(masked[..., None], self.mask.astype(self.dtype)[None, None, :], x)

    def _patch_positions(self, rows: int, columns: int) -> Float[Array, "N D"]:
        """Learned positions, interpolated if the grid is not the one they were learned on."""
        side = self.image_size // self.patch_size
        table = self.positions[int(_POOLS[self.pool]) :]
        if (rows, columns) == (side, side):
            return table
        grid = table.reshape(1, side, side, self.width)
        return resize(grid, (rows, columns), method="bicubic").reshape(-1, self.width)

    def _run_blocks(self, x: Float[Array, "B T D"], train: bool) -> Float[Array, "B T D"]:
        """One traced block, scanned over stacked parameters."""

        def block(module, x, rate):
            return module(x, rate if self.drop_path else 0.0, train=train)

        rates = jnp.asarray(drop_path_rates(self.drop_path, self.depth))
        return run_stacked(block, self.blocks, x, rates, self.depth, self.remat)

    def _check(self) -> None:
        require_policy("VisionTransformer", self.remat)
        if self.pool not in _POOLS:
            raise ValueError(f"VisionTransformer: pool={self.pool!r} is none of {sorted(_POOLS)}")
        if self.width % self.num_heads:
            raise ValueError(
                f"VisionTransformer: num_heads={self.num_heads} does not divide width={self.width}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"VisionTransformer: image_size={self.image_size} is smaller than one patch of "
                f"patch_size={self.patch_size}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"VisionTransformer: drop_path={self.drop_path} is outside [0, 1)")


_TINY = {"width": 192, "depth": 12, "num_heads": 3}
_SMALL = {"width": 384, "depth": 12, "num_heads": 6}
_BASE = {"width": 768, "depth": 12, "num_heads": 12}
_LARGE = {"width": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"width": 1280, "depth": 32, "num_heads": 16}


def _published(size: dict, patch_size: int, overrides: dict) -> VisionTransformer:
    return VisionTransformer(**{**size, "patch_size": patch_size, **overrides})


@register_model
def vit_tiny_patch16_224(**overrides) -> VisionTransformer:
    """ViT-Ti/16 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_TINY, 16, overrides)


@register_model
def vit_small_patch8_224(**overrides) -> VisionTransformer:
    """ViT-S/8 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_SMALL, 8, overrides)


@register_model
def vit_small_patch16_224(**overrides) -> VisionTransformer:
    """ViT-S/16 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_SMALL, 16, overrides)


@register_model
def vit_small_patch32_224(**overrides) -> VisionTransformer:
    """ViT-S/32 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_SMALL, 32, overrides)


@register_model
def vit_base_patch8_224(**overrides) -> VisionTransformer:
    """ViT-B/8 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_BASE, 8, overrides)


@register_model
def vit_base_patch16_224(**overrides) -> VisionTransformer:
    """ViT-B/16 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_BASE, 16, overrides)


@register_model
def vit_base_patch32_224(**overrides) -> VisionTransformer:
    """ViT-B/32 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_BASE, 32, overrides)


@register_model
def vit_large_patch14_224(**overrides) -> VisionTransformer:
    """ViT-L/14 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_LARGE, 14, overrides)


@register_model
def vit_large_patch16_224(**overrides) -> VisionTransformer:
    """ViT-L/16 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_LARGE, 16, overrides)


@register_model
def vit_large_patch32_224(**overrides) -> VisionTransformer:
    """ViT-L/32 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_LARGE, 32, overrides)


@register_model
def vit_huge_patch14_224(**overrides) -> VisionTransformer:
    """ViT-H/14 for images of 224 x 224 pixels and 1000 classes."""
    return _published(_HUGE, 14, overrides)
