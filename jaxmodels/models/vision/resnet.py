"""ResNet: convolutions around identity connections.

Paper    He et al. 2016, "Deep Residual Learning for Image Recognition"
         (arXiv:1512.03385): the networks of table 1, with projections where the
         size changes (option B). v1.5 has the stride of a bottleneck on its 3 x 3
         convolution (`stride_on="3x3"`, the default and that of all public
         weights), v1 on the first 1 x 1.
Differs  The last norm of each block starts at zero, so that blocks start as
         identities (Goyal et al. 2017, arXiv:1706.02677, section 5.1). Strides
         beyond `output_stride` become dilations (Chen et al. 2017,
         arXiv:1706.05587, section 3). `stem="cifar"` is for small images: one
         3 x 3 convolution without stride and pooling, as in section 4.2.
Weights  transformers' `resnet` (ResNetModel, ResNetForImageClassification), both
         ways, by `jaxmodels.load_pretrained` and `jaxmodels.save_pretrained`.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.repeated_blocks import require_policy, run_in_turn
from jaxmodels.models.vision.checks import require_images
from jaxmodels.ops.pooling import max_pool
from jaxmodels.registry import register_model

# The published deviation, whatever the next layer reads.
_unit = partial(ConvNorm, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1, added to the input (figure 5).

    Attributes:
      features: channels of the output.
      bottleneck: three convolutions, the inner ones a quarter as wide.
      project: maps the input by a 1 x 1 convolution before adding it.
      stride, dilation: of the block.
      stride_on: "3x3" or "1x1", which convolution of a bottleneck has the stride.
      norm: "batch" or "frozen".
      dtype: of the computation.
    """

    features: int
    bottleneck: bool
    project: bool = False
    stride: int = 1
    dilation: int = 1
    stride_on: str = "3x3"
    norm: str = "batch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], *, train: bool) -> Float[Array, "B V U F"]:
        """Returns images of `features` channels, smaller by the stride."""

        def unit(features: int, size: int, name: str, **options) -> ConvNorm:
            return _unit(features, size, norm=self.norm, dtype=self.dtype, name=name, **options)

        last = {"activation": None, "scale_init": nn.initializers.zeros}
        if self.bottleneck:
            narrow = self.features // 4
            early, late = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
            units = [
                unit(narrow, 1, "conv_1", stride=early),
                unit(narrow, 3, "conv_2", stride=late, dilation=self.dilation),
                unit(self.features, 1, "conv_3", **last),
            ]
        else:
            units = [
                unit(self.features, 3, "conv_1", stride=self.stride, dilation=self.dilation),
                unit(self.features, 3, "conv_2", dilation=self.dilation, **last),
            ]
        shortcut = x
        if self.project:
            project = unit(self.features, 1, "shortcut", stride=self.stride, activation=None)
            shortcut = project(x, train=train)
        for layer in units:
            x = layer(x, train=train)
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """Residual network for images of any size.

    Attributes:
      depths: blocks of each stage.
      widths: channels of each stage.
      bottleneck: kind of block, see `ResidualBlock`.
      stem_width: channels of the first convolution.
      stem: "imagenet" is 7 x 7 of stride 2 and max-pooling of stride 2, "cifar" a
        3 x 3 of stride 1.
      in_channels: of the images.
      num_classes: logits; 0 makes the call return the pooled features.
      stride_on: "3x3" (v1.5) or "1x1" (v1).
      output_stride: of the last stage, 8, 16 or 32; smaller ones dilate. Counted
        with the stem of "imagenet"; that of "cifar" has a quarter of it.
      norm: "batch", or "frozen" for statistics and scales that do not train.
      remat: what the backward pass computes again, a policy of
        `ops.rematerialisation`, a stage by itself; on CPUs after `cpu.tune()` (see `run_in_turn`).
      dtype: of the computation; parameters are float32.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    bottleneck: bool = True
    stem_width: int = 64
    stem: str = "imagenet"
    in_channels: int = 3
    num_classes: int = 1000
    stride_on: str = "3x3"
    output_stride: int = 32
    norm: str = "batch"
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, in the order of table 1."""
        self._check()
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        self.stem_conv = _unit(self.stem_width, size, stride, norm=self.norm, dtype=self.dtype)
        self.stages = [self._stage(i) for i in range(len(self.depths))]
        if self.num_classes:
            self.head = Linear(
                self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal()
            )

    def _stage(self, index: int) -> list[ResidualBlock]:
        width, stride = self.widths[index], self._strides()[index]
        first, rest = self._dilations()[index]
        project = index > 0 or width != self.stem_width
        options = {"stride_on": self.stride_on, "norm": self.norm, "dtype": self.dtype}
        return [
            ResidualBlock(
                width,
                self.bottleneck,
                project=project and block == 0,
                stride=1 if block else stride,
                dilation=rest if block else first,
                **options,
            )
            for block in range(self.depths[index])
        ]

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in each map of `features`."""
        stride, strides = 4 if self.stem == "imagenet" else 1, {}
        for i, step in enumerate(self._strides()):
            stride *= step
            strides[f"C{i + 2}"] = stride
        return strides

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B classes"]:
        """Classifies images.

        Args:
          images: of any size.
          train: normalises by the batch; updates the collection "batch_stats",
            which must then be mutable.

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
        """The maps of all stages by name, "C2" to "C5"; raises as the call."""
        require_images("ResNet", images, self.in_channels, 1)
        x = self.stem_conv(images.astype(self.dtype), train=train)
        if self.stem == "imagenet":
            x = max_pool(x, 3, stride=2, padding=1)
        maps = {}
        for i, stage in enumerate(self.stages):

            def run(model, block, x, stage=i):
                return model.stages[stage][block](x, train=train)

            last = i == len(self.depths) - 1
            x = run_in_turn(run, self, x, len(stage), self.remat, last=last)
            maps[f"C{i + 2}"] = x
        return maps

    def _strides(self) -> list[int]:
        """Of each stage; the last ones give theirs up for a smaller output stride."""
        strides, total = [1], 4
        for _ in self.depths[1:]:
            strides.append(2 if total < self.output_stride else 1)
            total *= strides[-1]
        return strides

    def _dilations(self) -> list[tuple[int, int]]:
        """Of the first block of each stage, and of the others.

        The first 3 x 3 convolution of a stage that lost its stride still sees
        what it saw with it, so it keeps the dilation of the stage before.
        """
        dilation, dilations = 1, []
        for i, stride in enumerate(self._strides()):
            before = dilation
            if i and stride == 1:
                dilation *= 2
            dilations.append((before, dilation))
        return dilations

    def _check(self) -> None:
        require_policy(type(self).__name__, self.remat)
        choices = {"stem": ("imagenet", "cifar"), "stride_on": ("3x3", "1x1")}
        choices["output_stride"] = (8, 16, 32)
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"ResNet: {field}={getattr(self, field)!r} is none of {list(allowed)}"
                )
        if len(self.depths) != len(self.widths):
            raise ValueError(
                f"ResNet: depths={self.depths} and widths={self.widths} differ in length"
            )


_BASIC = {"bottleneck": False, "widths": (64, 128, 256, 512)}


@register_model
def resnet18(**overrides) -> ResNet:
    """ResNet-18 for 1000 classes."""
    return ResNet(**{"depths": (2, 2, 2, 2), **_BASIC, **overrides})


@register_model
def resnet34(**overrides) -> ResNet:
    """ResNet-34 for 1000 classes."""
    return ResNet(**{"depths": (3, 4, 6, 3), **_BASIC, **overrides})


@register_model
def resnet50(**overrides) -> ResNet:
    """ResNet-50 v1.5 for 1000 classes."""
    return ResNet(**{"depths": (3, 4, 6, 3), **overrides})


@register_model
def resnet101(**overrides) -> ResNet:
    """ResNet-101 v1.5 for 1000 classes."""
    return ResNet(**{"depths": (3, 4, 23, 3), **overrides})


@register_model
def resnet152(**overrides) -> ResNet:
    """ResNet-152 v1.5 for 1000 classes."""
    return ResNet(**{"depths": (3, 8, 36, 3), **overrides})
