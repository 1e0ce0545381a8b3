"""Darknet-19 and Darknet-53: the plain and the residual backbone of YOLO v2 and v3.

Papers   Redmon and Farhadi 2017, "YOLO9000: Better, Faster, Stronger"
         (arXiv:1612.08242): Darknet-19, section 3 and table 6. Redmon and Farhadi
         2018, "YOLOv3: An Incremental Improvement" (arXiv:1804.02767): Darknet-53,
         section 2.4 and table 1.
Differs  The classifier of Darknet-19 averages before its 1 x 1 convolution, which is
         then a linear map; the order makes no difference. Batch norm has the
         epsilon and the momentum of this library.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.linear import Linear
from jaxmodels.models.vision.checks import require_images
from jaxmodels.ops.pooling import max_pool
from jaxmodels.registry import register_model

leaky_relu = partial(nn.leaky_relu, negative_slope=0.1)
DarkConv = partial(ConvNorm, activation=leaky_relu)


class DarkBlock(nn.Module):
    """A 1 x 1 convolution to half the channels and a 3 x 3 one back.

    Attributes:
      features: channels of the output.
      residual: adds the input.
      norm: "batch", "frozen", or None for biases instead.
      dtype: of the computation.
    """

    features: int
    residual: bool = False
    norm: str | None = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B Y X F"]:
        """Returns a map of `features` channels, which is C if residual."""
        options = {"norm": self.norm, "dtype": self.dtype}
        out = DarkConv(self.features // 2, 1, **options, name="reduce")(x, train=train)
        out = DarkConv(self.features, 3, **options, name="expand")(out, train=train)
        return x + out if self.residual else out


class Darknet(nn.Module):
    """Stages of one 3 x 3 convolution and some `DarkBlock`s, each at half the size before.

    Attributes:
      depths: blocks of each stage; the first stage is at the images' own size.
      widths: channels of each stage.
      residual: blocks add to their input, and the first convolution of a stage
        has the stride; otherwise max-pooling stands before each stage.
      in_channels: of the images.
      num_classes: logits; 0 makes the call return the pooled features.
      norm: "batch", or "frozen" for statistics and scales that do not train.
      dtype: of the computation; parameters are float32.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    residual: bool = False
    in_channels: int = 3
    num_classes: int = 1000
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, in the order of the tables."""
        if len(self.depths) != len(self.widths):
            raise ValueError(
                f"Darknet: depths={self.depths} and widths={self.widths} differ in length"
            )
        options = {"norm": self.norm, "dtype": self.dtype}
        self.stages = [
            [
                DarkConv(width, 3, stride=2 if self.residual and i else 1, **options),
                *(DarkBlock(width, self.residual, **options) for _ in range(depth)),
            ]
            for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True))
        ]
        if self.num_classes:
            self.head = Linear(
                self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal()
            )

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in each map of `features`."""
        return {f"C{i}": 2**i for i in range(2, len(self.depths))}

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B classes"]:
        """Classifies images.

        Args:
          images: of any size from one place of the last map.
          train: normalises by the batch; updates the collection "batch_stats",
            which must then be mutable.

        Returns:
          Logits, or the pooled features if num_classes is 0, in `dtype`.

        Raises:
          ValueError: depths and widths disagree, or images are not what the fields say.
        """
        *_, last = self._maps(images, train)
        x = last.mean(axis=(1, 2))
        return self.head(x) if self.num_classes else x

    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The maps of stride 4 and more by name, "C2" to "C5"; raises as the call."""
        return {f"C{i}": x for i, x in enumerate(self._maps(images, train)) if i >= 2}

    def _maps(self, images: Float[Array, "B Y X C"], train: bool) -> list[Array]:
        require_images("Darknet", images, self.in_channels, 2 ** (len(self.depths) - 1))
        x, maps = images.astype(self.dtype), []
        for i, stage in enumerate(self.stages):
            if i and not self.residual:
                x = max_pool(x, 2)
            for layer in stage:
                x = layer(x, train=train)
            maps.append(x)
        return maps


@register_model
def darknet19(**overrides) -> Darknet:
    """Darknet-19 for 1000 classes."""
    return Darknet(**{"depths": (0, 0, 1, 1, 2, 2), **overrides})


@register_model
def darknet53(**overrides) -> Darknet:
    """Darknet-53 for 1000 classes."""
    return Darknet(**{"depths": (0, 1, 2, 8, 8, 4), "residual": True, **overrides})
