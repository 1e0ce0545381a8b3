"""DiT: a diffusion transformer, here a field of velocities or noise on latents or pixels.

Paper    Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"
         (arXiv:2212.09748): section 3.2 with adaLN-zero blocks, the sizes of
         table 1, the initialisation of the published code.
Differs  The frequencies of the timestep embedding end at exactly 1 / 10000, and
         the second norm of a block has epsilon 1e-5, as in `diffusers`, whose
         converted weights are the ones people run. The weights of all blocks are
         stacked along a leading axis of length `depth`.
Weights  folders of `diffusers`' DiTTransformer2DModel, both ways, by
         `jaxmodels.load_pretrained` and `jaxmodels.save_pretrained`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from jaxmodels.layers.attention import Attention
from jaxmodels.layers.embeddings import LabelEmbedding, TimestepEmbedding
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mlp import Mlp
from jaxmodels.layers.patch_embed import PatchEmbed
from jaxmodels.layers.repeated_blocks import require_policy, run_stacked
from jaxmodels.ops.norms import adaptive_layer_norm
from jaxmodels.ops.patches import unpatchify
from jaxmodels.ops.positions import sincos_positions_2d
from jaxmodels.registry import create_mixer, module_fields, register_model

# Xavier's for one (width, 3 * width) matrix, which the published code has.
_FUSED_QKV_INIT = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class Modulation(nn.Module):
    """Shifts, scales and gates of one block from the condition; all zero at first.

    Attributes:
      count: how many vectors of the condition's width are wanted.
      dtype: of the computation.
    """

    count: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, condition: Float[Array, "B D"]) -> list[Float[Array, "B D"]]:
        """Returns `count` arrays of the condition's shape."""
        vectors = Linear(
            self.count * condition.shape[-1],
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name="project",
        )(nn.silu(condition))
        return jnp.split(vectors, self.count, axis=-1)


class DiTBlock(nn.Module):
    """Attention and feed-forward, each between a modulated norm and a gate (figure 3).

    Attributes: as of `DiT`.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    mixer: str | None = None
    mixer_options: Mapping[str, Any] = FrozenDict()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], condition: Float[Array, "B D"]
    ) -> Float[Array, "B N D"]:
        """Returns the tokens after this block; the same tokens at initialisation."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Modulation(
            6, dtype=self.dtype, name="modulation"
        )(condition)
        h = adaptive_layer_norm(x, shift_1, scale_1)
        h = self._mix(h)
        x = x + gate_1[:, None, :] * h
        h = adaptive_layer_norm(x, shift_2, scale_2, epsilon=1e-5)
        h = Mlp(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(h)
        return x + gate_2[:, None, :] * h

    def _mix(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        if self.mixer is None:
            return Attention(
                self.num_heads,
                use_bias=True,
                dtype=self.dtype,
                kernel_init=_FUSED_QKV_INIT,
                name="attention",
            )(x)
        heads = {"num_heads": self.num_heads, "head_dim": x.shape[-1] // self.num_heads}
        fields = module_fields(create_mixer(self.mixer).clone(parent=None))
        heads = {field: value for field, value in heads.items() if field in fields}
        options = {"causal": False, "dtype": self.dtype, **heads, **self.mixer_options}
        mixer = create_mixer(self.mixer, **options).clone(parent=self, name="mixer")
        return mixer(x)[0]


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to the pixels of each patch; zero at first.

    Attributes:
      features: values per patch.
      dtype: of the computation.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], condition: Float[Array, "B D"]
    ) -> Float[Array, "B N F"]:
        """Returns `features` values for each token."""
        shift, scale = Modulation(2, dtype=self.dtype, name="modulation")(condition)
        return Linear(
            self.features, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="project"
        )(adaptive_layer_norm(x, shift, scale))


class DiT(nn.Module):
    """Diffusion transformer conditioned on time and class.

    Attributes:
      input_size: side of the square latent or image.
      patch_size: side of a patch; must divide input_size.
      in_channels: of the input.
      out_channels: of the output; None for as many as the input (rectified flow).
        The published models predict noise and variance, hence twice as many.
      width: of a token; a multiple of four and of num_heads.
      depth: number of blocks.
      num_heads: of each attention.
      mlp_ratio: hidden width of the feed-forward over width.
      num_classes: labels are 0 to num_classes - 1; num_classes itself means no class.
      label_dropout: probability that a training label turns into no class.
      mixer: None is attention as published; the name of any bidirectional
        sequence mixer puts that in its place, with this model's heads.
      mixer_options: fields of the mixer.
      remat: what the backward pass computes again, a policy of
        `ops.rematerialisation`. "dots" takes a third of the memory of "none" and, as
        reading memory is what costs, less time.
      dtype: of the computation; parameters are float32.
    """

    width: int
    depth: int
    num_heads: int
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int | None = None
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    label_dropout: float = 0.1
    mixer: str | None = None
    mixer_options: Mapping[str, Any] = FrozenDict()
    remat: str = "dots"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        timesteps: Float[Array, "B"],
        labels: Int[Array, "B"],
        *,
        train: bool = False,
    ) -> Float[Array, "B Y X O"]:
        """Predicts a value for every pixel; exactly zero at initialisation.

        Args:
          x: noisy latents or images.
          timesteps: in [0, 1000]; a flow passes 1000 t.
          labels: in [0, num_classes]; others give NaN, since values cannot be
            checked inside a compiled function.
          train: drops labels, by the key `rngs={"dropout": key}` of `apply`.

        Returns:
          An array of x's shape with `out_channels` channels, in `dtype`.

        Raises:
          ValueError: fields contradict each other, or x is not what they say.
        """
        self._check(x)
        grid = self.input_size // self.patch_size
        condition = TimestepEmbedding(self.width, dtype=self.dtype, name="timestep_embedding")(
            timesteps
        ) + LabelEmbedding(
            self.num_classes,
            self.width,
            self.label_dropout,
            dtype=self.dtype,
            name="label_embedding",
        )(labels, train=train)

        tokens = PatchEmbed(self.width, self.patch_size, dtype=self.dtype, name="patch_embed")(x)
        positions = sincos_positions_2d(grid, grid, self.width)
        tokens = tokens + positions.astype(self.dtype)[None]
        tokens = self._blocks(tokens, condition)
        channels = self.in_channels if self.out_channels is None else self.out_channels
        patches = FinalLayer(self.patch_size**2 * channels, dtype=self.dtype, name="final")(
            tokens, condition
        )
        return unpatchify(patches, grid, grid, self.patch_size)

    def _blocks(
        self, tokens: Float[Array, "B N D"], condition: Float[Array, "B D"]
    ) -> Float[Array, "B N D"]:
        """One traced block, scanned over stacked parameters: compiles in the time of one."""
        module = DiTBlock(
            self.num_heads,
            self.mlp_ratio,
            self.mixer,
            self.mixer_options,
            dtype=self.dtype,
            name="blocks",
        )

        def block(module, tokens, _):
            return module(tokens, condition)

        return run_stacked(block, module, tokens, None, self.depth, self.remat)

    def _check(self, x: Float[Array, "B Y X C"]) -> None:
        require_policy("DiT", self.remat)
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(
                f"DiT: width={self.width} must be a multiple of 4 (sine and cosine of row and "
                f"column) and of num_heads={self.num_heads}"
            )
        if self.input_size % self.patch_size:
            raise ValueError(
                f"DiT: patch_size={self.patch_size} does not divide input_size={self.input_size}"
            )
        expected = (self.input_size, self.input_size, self.in_channels)
        if x.shape[1:] != expected:
            raise ValueError(
                f"DiT: x of shape {x.shape} is not (batch, {', '.join(map(str, expected))}), the "
                f"model's input_size and in_channels; images are channels last (B, Y, X, C)"
            )


# Table 1 of the paper.
_SMALL = {"width": 384, "depth": 12, "num_heads": 6}
_BASE = {"width": 768, "depth": 12, "num_heads": 12}
_LARGE = {"width": 1024, "depth": 24, "num_heads": 16}
_EXTRA_LARGE = {"width": 1152, "depth": 28, "num_heads": 16}


def _published(size: dict, patch_size: int, overrides: dict) -> DiT:
    return DiT(**{**size, "patch_size": patch_size, "out_channels": 8, **overrides})


@register_model
def dit_s_2(**overrides) -> DiT:
    """DiT-S/2 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_SMALL, 2, overrides)


@register_model
def dit_s_4(**overrides) -> DiT:
    """DiT-S/4 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_SMALL, 4, overrides)


@register_model
def dit_s_8(**overrides) -> DiT:
    """DiT-S/8 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_SMALL, 8, overrides)


@register_model
def dit_b_2(**overrides) -> DiT:
    """DiT-B/2 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_BASE, 2, overrides)


@register_model
def dit_b_4(**overrides) -> DiT:
    """DiT-B/4 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_BASE, 4, overrides)


@register_model
def dit_b_8(**overrides) -> DiT:
    """DiT-B/8 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_BASE, 8, overrides)


@register_model
def dit_l_2(**overrides) -> DiT:
    """DiT-L/2 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_LARGE, 2, overrides)


@register_model
def dit_l_4(**overrides) -> DiT:
    """DiT-L/4 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_LARGE, 4, overrides)


@register_model
def dit_l_8(**overrides) -> DiT:
    """DiT-L/8 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_LARGE, 8, overrides)


@register_model
def dit_xl_2(**overrides) -> DiT:
    """DiT-XL/2 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_EXTRA_LARGE, 2, overrides)


@register_model
def dit_xl_4(**overrides) -> DiT:
    """DiT-XL/4 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_EXTRA_LARGE, 4, overrides)


@register_model
def dit_xl_8(**overrides) -> DiT:
    """DiT-XL/8 as published: 32 x 32 x 4 latents, noise and variance out, 1000 classes."""
    return _published(_EXTRA_LARGE, 8, overrides)
