"""Extraction: the first twenty convolutions of YOLO v1, trained as a classifier.

Paper    Redmon et al. 2016, "You Only Look Once: Unified, Real-Time Object
         Detection" (arXiv:1506.02640): figure 3 up to the map of stride 32, and
         section 2.2 for its training on ImageNet. Darknet calls it Extraction.
Differs  The paper has no batch norm and neither do the defaults; `norm="batch"` adds
         it, as YOLO v2 does before anything else.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from jaxmodels.layers.linear import Linear
from jaxmodels.models.vision.checks import require_images
from jaxmodels.models.vision.darknet import DarkBlock, DarkConv
from jaxmodels.ops.pooling import max_pool
from jaxmodels.registry import register_model


class Extraction(nn.Module):
    """A 7 x 7 convolution, a 3 x 3 one, then stages of `DarkBlock`s, with max-pooling between.

    Attributes:
      stem_widths: channels of the two first convolutions; the first has stride 2.
      widths: channels of every block of every further stage.
      in_channels: of the images.
      num_classes: logits; 0 makes the call return the pooled features.
      norm: None for biases, "batch", or "frozen".
      dtype: of the computation; parameters are float32.
    """

    stem_widths: tuple[int, int] = (64, 192)
    widths: tuple[tuple[int, ...], ...] = ((256, 512), (512, 512, 512, 512, 1024), (1024, 1024))
    in_channels: int = 3
    num_classes: int = 1000
    norm: str | None = None
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, in the order of figure 3."""
        options = {"norm": self.norm, "dtype": self.dtype}
        first, second = self.stem_widths
        self.stem = [DarkConv(first, 7, stride=2, **options), DarkConv(second, 3, **options)]
        self.stages = [[DarkBlock(width, **options) for width in stage] for stage in self.widths]
        if self.num_classes:
            self.head = Linear(
                self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal()
            )

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels between neighbours in each map of `features`."""
        return {f"C{i}": 2**i for i in range(2, len(self.widths) + 3)}

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B classes"]:
        """Classifies images.

        Args:
          images: of any size from one place of the last map.
          train: with a norm, normalises by the batch and updates "batch_stats".

        Returns:
          Logits, or the pooled features if num_classes is 0, in `dtype`.

        Raises:
          ValueError: images are not what the fields say.
        """
        *_, last = self.features(images, train=train).values()
        x = last.mean(axis=(1, 2))
        return self.head(x) if self.num_classes else x

    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> dict[str, Float[Array, "B V U D"]]:
        """The maps before each pooling but the first by name, "C2" to "C5"; raises as the call."""
        require_images("Extraction", images, self.in_channels, 2 ** (len(self.widths) + 2))
        x = self.stem[0](images.astype(self.dtype), train=train)
        x = self.stem[1](max_pool(x, 2), train=train)
        maps = {"C2": x}
        for i, stage in enumerate(self.stages):
            x = max_pool(x, 2)
            for block in stage:
                x = block(x, train=train)
            maps[f"C{i + 3}"] = x
        return maps


@register_model
def extraction(**overrides) -> Extraction:
    """The network of YOLO v1 up to its detection layers, for 1000 classes."""
    return Extraction(**overrides)
