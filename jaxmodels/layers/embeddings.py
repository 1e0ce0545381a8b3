"""What a network is conditioned on, as vectors: time and class."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from jaxmodels.layers.linear import Linear
from jaxmodels.ops.positions import sincos_timesteps

_NORMAL = nn.initializers.normal(stddev=0.02)


class TimestepEmbedding(nn.Module):
    """Sine and cosine features of a timestep through a small network.

    Attributes:
      width: of the embedding.
      num_features: how many sines and cosines the network sees.
      dtype: of the computation; the features themselves are float32.

    Source: Peebles and Xie 2023, section 3.2 and appendix A (arXiv:2212.09748).
    """

    width: int
    num_features: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, timesteps: Float[Array, "B"]) -> Float[Array, "B D"]:
        """Returns an embedding for each timestep, a number in about [0, 1000]."""
        x = sincos_timesteps(timesteps, self.num_features)
        x = Linear(self.width, dtype=self.dtype, kernel_init=_NORMAL, name="up")(x)
        return Linear(self.width, dtype=self.dtype, kernel_init=_NORMAL, name="down")(nn.silu(x))


class LabelEmbedding(nn.Module):
    """A vector a class, and one more for 'no class', used by classifier-free guidance.

    The label `num_classes` means no class. While training, labels turn into it
    at random, by the "dropout" key.

    Attributes:
      num_classes: without the one for no class.
      width: of the embedding.
      dropout: probability that a training label turns into no class.
      dtype: of the result.

    Source: Ho and Salimans 2021, "Classifier-Free Diffusion Guidance",
    algorithm 1 (arXiv:2207.12598).
    """

    num_classes: int
    width: int
    dropout: float = 0.1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, labels: Int[Array, "B"], *, train: bool = False) -> Float[Array, "B D"]:
        """Returns an embedding for each label in [0, num_classes], which is not checked."""
        if train and self.dropout > 0:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.dropout, labels.shape)
            labels = jnp.where(dropped, self.num_classes, labels)
        return nn.Embed(
            self.num_classes + 1,
            self.width,
            dtype=self.dtype,
            embedding_init=_NORMAL,
            name="table",
        )(labels)
