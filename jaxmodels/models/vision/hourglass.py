"""Hourglass: down to the whole image, up to its places, again and again.

Paper    Newell et al. 2016, "Stacked Hourglass Networks for Human Pose Estimation"
         (arXiv:1603.06937): the module of section 3.1, stacked with intermediate
         supervision (section 3.3); in the form of Law and Deng 2018, "CornerNet"
         (arXiv:1808.01244), section 3.5: basic residual blocks, strides instead of
         pooling, wider levels further down. Hourglass-104 is theirs.
Differs  From the first paper, the predictions of a stack are not fed to the next, as
         in the second. The last norm of each block starts at zero (Goyal et al. 2017,
         arXiv:1706.02677, section 5.1). Images of any size: where a level has an odd
         side, the map from below is cut to it.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.models.vision.checks import require_images
from jaxmodels.models.vision.resnet import ResidualBlock
from jaxmodels.registry import register_model


class HourglassModule(nn.Module):
    """One hourglass: a map of the size it was given, made with all sizes below (figure 3).

    Attributes:
      widths: channels of each level, the first those of the input and output.
      depths: residual blocks of each level on the way down, and of each level's
        bridge; the last counts those at the bottom.
      norm: "batch" or "frozen".
      dtype: of the computation.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X C"]:
        """Returns a map of the same shape."""
        bridges, levels = [], range(len(self.widths) - 1)
        for i in levels:
            width, depth = self.widths[i], self.depths[i]
            bridges.append(self._blocks(x, [width] * depth, f"bridge_{i}", train))
            x = self._blocks(x, [self.widths[i + 1]] * depth, f"down_{i}", train, stride=2)
        x = self._blocks(x, [self.widths[-1]] * self.depths[-1], "bottom", train)
        for i in reversed(levels):
            widths = [self.widths[i + 1]] * (self.depths[i] - 1) + [self.widths[i]]
            x = self._blocks(x, widths, f"up_{i}", train)
            x = bridges[i] + _doubled(x)[:, : bridges[i].shape[1], : bridges[i].shape[2]]
        return x

    def _blocks(self, x, widths, name, train, stride=1):
        """A row of residual blocks of these widths; the first has the stride."""
        for i, width in enumerate(widths):
            options = {"norm": self.norm, "dtype": self.dtype, "name": f"{name}_{i}"}
            x = _residual(x, width, 1 if i else stride, train, **options)
        return x


class Hourglass(nn.Module):
    """A stack of hourglasses at a quarter of the image's size.

    Attributes:
      widths, depths: of every hourglass, see `HourglassModule`.
      stacks: number of hourglasses.
      stem_width: channels of the first convolution.
      in_channels: of the images.
      norm: "batch", or "frozen" for statistics and scales that do not train.
      dtype: of the computation; parameters are float32.
    """

    widths: tuple[int, ...] = (256, 256, 384, 384, 384, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2, 2, 4)
    stacks: int = 2
    stem_width: int = 128
    in_channels: int = 3
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in each map of `features`: 4 in all."""
        return {f"stack_{i}": 4 for i in range(self.stacks)}

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B V U D"]:
        """The map of the last stack; raises as `features`."""
        *_, last = self.features(images, train=train).values()
        return last

    @nn.compact
    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The maps of all stacks by name, "stack_0" and so on, all of a stride of 4.

        Each wants a loss of its own (intermediate supervision).

        Args:
          images: of any size.
          train: normalises by the batch; updates the collection "batch_stats",
            which must then be mutable.

        Raises:
          ValueError: fields contradict each other, or images are not what they say.
        """
        self._check()
        require_images("Hourglass", images, self.in_channels, 1)
        options = {"norm": self.norm, "dtype": self.dtype}
        unit, width = partial(ConvNorm, **options), self.widths[0]
        x = unit(self.stem_width, 7, 2, name="stem")(images.astype(self.dtype), train=train)
        x = _residual(x, width, 2, train, **options, name="stem_block")
        maps = {}
        for i in range(self.stacks):
            if i:
                kept = unit(width, 1, activation=None, name=f"keep_{i}")(x, train=train)
                found = unit(width, 1, activation=None, name=f"merge_{i}")(out, train=train)
                merged = nn.relu(kept + found)
                x = _residual(merged, width, 1, train, **options, name=f"between_{i}")
            module = HourglassModule(self.widths, self.depths, **options, name=f"hourglass_{i}")
            out = unit(width, 3, name=f"out_{i}")(module(x, train=train), train=train)
            maps[f"stack_{i}"] = out
        return maps

    def _check(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"Hourglass: widths={self.widths} and depths={self.depths} differ in length"
            )
        if self.stacks < 1 or min(self.depths) < 1:
            raise ValueError(
                f"Hourglass: stacks={self.stacks} and depths={self.depths} must be at least 1"
            )


def _residual(x, width: int, stride: int, train: bool, **options) -> Float[Array, "B V U F"]:
    """A basic block to `width` channels, with a projection where the shape changes."""
    project = stride != 1 or width != x.shape[-1]
    block = ResidualBlock(width, False, project=project, stride=stride, **options)
    return block(x, train=train)


def _doubled(x: Float[Array, "B Y X C"]) -> Float[Array, "B V U C"]:
    """Twice the size, nearest: repeated, since the gradient of indexing is slow."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


@register_model
def hourglass104(**overrides) -> Hourglass:
    """Hourglass-104: two hourglasses of five levels down, 256 to 512 channels wide."""
    return Hourglass(**overrides)
