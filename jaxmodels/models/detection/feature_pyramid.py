"""Feature pyramid: maps of all strides with the meaning of the coarsest.

Paper    Lin et al. 2017, "Feature Pyramid Networks for Object Detection"
         (arXiv:1612.03144), section 3 and figure 3; P6 from section 4.1, footnote 2.
Differs  `extra="conv"` makes P6 and P7 by convolutions of P5, as Tian et al. 2019,
         "FCOS" (arXiv:1904.01355), section 3.2, with the ReLU between them that Lin
         et al. 2017, "Focal Loss for Dense Object Detection" (arXiv:1708.02002) has.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.conv_norm import ConvNorm
from jaxmodels.layers.convolution import Conv


class FeaturePyramid(nn.Module):
    """A top-down path over a backbone's maps; itself a backbone.

    inner_l = lateral_l(C_l) + upsample(inner_(l+1)),   P_l = output_l(inner_l)

    with 1 x 1 lateral and 3 x 3 output convolutions and nearest upsampling.

    Attributes:
      backbone: any module with `features` and `feature_strides`.
      levels: its maps to use, finest first; "C3" becomes "P3".
      width: channels of all maps of the pyramid.
      extra: coarser maps on top: "pool" takes every second place of the last, "conv"
        adds two by convolutions of stride 2, None adds nothing.
      norm: of the lateral and output convolutions, as of `ConvNorm`.
      dtype: of the computation; parameters are float32.
    """

    backbone: nn.Module
    levels: tuple[str, ...] = ("C2", "C3", "C4", "C5")
    width: int = 256
    extra: str | None = "pool"
    norm: str | None = None
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The convolutions of figure 3, and those of the extra maps."""
        self._check()
        options = {"norm": self.norm, "activation": None, "dtype": self.dtype}
        # A sum of uniform variance, whatever reads it: nothing is rectified between them.
        options["kernel_init"] = nn.initializers.lecun_normal()
        self.lateral = [ConvNorm(self.width, 1, **options) for _ in self.levels]
        self.output = [ConvNorm(self.width, 3, **options) for _ in self.levels]
        if self.extra == "conv":
            self.coarser = [Conv(self.width, 3, stride=2, dtype=self.dtype) for _ in range(2)]

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in each map of `features`."""
        known = self.backbone.feature_strides
        strides = {_pyramid_name(level): known[level] for level in self.levels}
        last = known[self.levels[-1]]
        for name in self._extra_names():
            last *= 2
            strides[name] = last
        return strides

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The same as `features`, so that the pyramid can be initialised alone."""
        return self.features(images, train=train)

    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The maps of the pyramid by name, finest first.

        Args:
          images: of any size that the backbone takes.
          train: passed to the backbone and the norms.

        Raises:
          ValueError: no such level or extra, or the backbone does not take the images.
        """
        known = self.backbone.feature_strides
        maps = self.backbone.features(images, train=train)
        pyramid, inner, before = {}, None, None
        for i in reversed(range(len(self.levels))):
            level = self.levels[i]
            lateral = self.lateral[i](maps[level].astype(self.dtype), train=train)
            if inner is not None:
                lateral = lateral + _upsampled(inner, before // known[level], lateral.shape)
            inner, before = lateral, known[level]
            pyramid[_pyramid_name(level)] = self.output[i](inner, train=train)
        return dict(reversed(pyramid.items())) | self._extra_maps(pyramid)

    def _extra_maps(self, pyramid: dict[str, Array]) -> dict[str, Array]:
        last = pyramid[_pyramid_name(self.levels[-1])]
        if self.extra is None:
            return {}
        if self.extra == "pool":
            return dict.fromkeys(self._extra_names(), last[:, ::2, ::2])
        first = self.coarser[0](last)
        return dict(zip(self._extra_names(), (first, self.coarser[1](nn.relu(first))), strict=True))

    def _extra_names(self) -> list[str]:
        top = int(self.levels[-1][1:])
        count = {"pool": 1, "conv": 2, None: 0}[self.extra]
        return [f"P{top + i + 1}" for i in range(count)]

    def _check(self) -> None:
        known = self.backbone.feature_strides
        if missing := [level for level in self.levels if level not in known]:
            raise ValueError(f"FeaturePyramid: levels {missing} are none of the backbone's {known}")
        if self.extra not in ("pool", "conv", None):
            raise ValueError(
                f"FeaturePyramid: extra={self.extra!r} is none of 'pool', 'conv' and None"
            )


def _pyramid_name(level: str) -> str:
    return f"P{level[1:]}"


def _upsampled(x: Array, factor: int, shape: tuple[int, ...]) -> Array:
    """Nearest; a map of odd size is cut, which picks the pixels that torch's resizing picks."""
    for axis in (1, 2):
        x = jnp.repeat(x, factor, axis=axis)
    return x[:, : shape[1], : shape[2]]
