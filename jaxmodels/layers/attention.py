"""Multi-head self-attention with its projections."""

import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxmodels import ops
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.normalization import TOKEN_NORMS
from jaxmodels.ops.linear import linear
from jaxmodels.ops.mesh_axes import axis_size


class Attention(nn.Module):
    """Self-attention: project, optionally normalise q and k, mix, project back.

    out = W_out attention(norm(W_q x), norm(W_k x), W_v x)

    The parameters are `q`, `k`, `v` and `out`, each a `kernel` (in, heads *
    head_dim) and a `bias`, and `q_norm` and `k_norm` over one head with
    QK-norm, as most checkpoints have them. The three input projections are one
    matrix product nevertheless, which is a fifth faster in training; except for a
    single token, as in decoding, where joining the kernels costs more than the product,
    and where heads are split over devices.

    Attributes:
      num_heads, num_kv_heads: query heads, and key/value heads (as many if None).
      head_dim: width of a head; None is the model width over num_heads.
      use_bias: gives all four projections a bias.
      qk_norm: normalises queries and keys per head, "rms" as in Qwen 3 or
        "layer" as in ViT-22B; norm_eps is its epsilon.
      dtype: of the computation; parameters are float32.
      kernel_init, out_init: of the k and v kernels, and of the output kernel.
      q_init: of the q kernel; None is kernel_init. See `t5_initializers`.
      causal, window, softcap, scale: as in `ops.dot_product_attention`.
      sinks: learns an extra logit a head, `sinks`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = True
    qk_norm: str | None = None
    norm_eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    q_init: Initializer | None = None
    out_init: Initializer = nn.initializers.xavier_uniform()
    causal: bool = False
    window: int | tuple[int, int] | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B T D"],
        *,
        bias: Float[Array, "..."] | None = None,
        mask: Bool[Array, "..."] | None = None,
        segment_ids: Int[Array, "*B T"] | None = None,
    ) -> Float[Array, "*B T D"]:
        """Mixes the sequence; the arguments are those of `ops.dot_product_attention`.

        Raises:
          ValueError: num_heads does not divide the width and head_dim is None,
            qk_norm is unknown, or the options contradict each other.
        """
        q, k, v = self._heads(x)
        out = ops.dot_product_attention(
            q,
            k,
            v,
            bias=bias,
            mask=mask,
            segment_ids=segment_ids,
            causal=self.causal,
            window=self.window,
            **self._logit_options(),
        )
        return self._merge(out, x.shape[-1])

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, (*B, T, heads, head_dim) each, normalised if so asked."""
        q, k, v = self._project(x)
        if self.qk_norm is not None:
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        return q, k, v

    def _logit_options(self) -> dict:
        """What shapes the logits, and the parameters it needs."""
        sinks = (
            self.param("sinks", nn.initializers.zeros, (self.num_heads,)) if self.sinks else None
        )
        return {"scale": self.scale, "softcap": self.softcap, "sinks": sinks}

    def _merge(self, out: Array, width: int) -> Array:
        """All heads' values, (*B, T, heads, head_dim), to the model's width."""
        project = Linear(
            width,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.out_init,
            name="out",
        )
        return project(out.reshape(*out.shape[:-2], -1))

    def _project(self, x: Array) -> list[Array]:
        head_dim = self.head_dim or self._even_split(x.shape[-1])
        kv_heads = self.num_kv_heads or self.num_heads
        heads = {"q": self.num_heads, "k": kv_heads, "v": kv_heads}
        inits = {"q": self.q_init or self.kernel_init, "k": self.kernel_init, "v": self.kernel_init}
        weights = {
            name: _Weights(count * head_dim, self.use_bias, inits[name], name=name)(x.shape[-1])
            for name, count in heads.items()
        }
        # Joining kernels that lie split over devices would move them.
        if x.shape[-2] == 1 or axis_size("tensor") > 1:
            parts = [self._product(x, *weights[name]) for name in heads]
        else:
            joined = (jnp.concatenate(pair, -1) for pair in zip(*weights.values(), strict=True))
            ends = [self.num_heads * head_dim, (self.num_heads + kv_heads) * head_dim]
            parts = jnp.split(self._product(x, *joined), ends, axis=-1)
        return [part.reshape(*x.shape[:-1], -1, head_dim) for part in parts]

    def _product(self, x: Array, kernel: Array, bias: Array) -> Array:
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return linear(x, kernel, bias if self.use_bias else None)

    def _even_split(self, width: int) -> int:
        if width % self.num_heads:
            raise ValueError(
                f"Attention: num_heads={self.num_heads} does not divide the width {width}; "
                f"choose a divisor or give head_dim"
            )
        return width // self.num_heads

    def _norm(self, name: str) -> nn.Module:
        if self.qk_norm not in TOKEN_NORMS:
            raise ValueError(f'Attention: qk_norm={self.qk_norm!r} is neither "rms" nor "layer"')
        return TOKEN_NORMS[self.qk_norm](epsilon=self.norm_eps, dtype=self.dtype, name=name)


class _Weights(nn.Module):
    """The parameters of a Dense without its product, so that products can be joined."""

    features: int
    use_bias: bool
    kernel_init: Initializer

    @nn.compact
    def __call__(self, width: int) -> tuple[Array, Array]:
        kernel = self.param("kernel", self.kernel_init, (width, self.features))
        if not self.use_bias:
            return kernel, jnp.zeros((0,))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


def t5_initializers(width: int, num_heads: int, head_dim: int) -> dict[str, Initializer]:
    """Initialisers that take the place of the scale 1 / sqrt(K), as in T5.

    q ~ N(0, 1 / (D K)),   k, v ~ N(0, 1 / D),   out ~ N(0, 1 / (H K))

    With inputs of variance one, logits of `Attention(scale=1.0)` start with
    variance one: the factor is in the queries' kernel instead of the logits.

    Args:
      width: the model width D.
      num_heads: query heads H.
      head_dim: width of a head K.

    Returns:
      The arguments `q_init`, `kernel_init` and `out_init` of `Attention`.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with
    a Unified Text-to-Text Transformer" (arXiv:1910.10683), with the constants of
    its public implementation in Mesh TensorFlow.
    """
    return {
        "q_init": nn.initializers.normal((width * head_dim) ** -0.5),
        "kernel_init": nn.initializers.normal(width**-0.5),
        "out_init": nn.initializers.normal((num_heads * head_dim) ** -0.5),
    }
