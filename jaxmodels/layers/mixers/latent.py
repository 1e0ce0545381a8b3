"""Multi-head latent attention: one small latent a token stands for all its keys and values.

Paper    DeepSeek-AI 2024, "DeepSeek-V2", section 2.1 (arXiv:2405.04434), as in
         DeepSeek-V3, section 2.1.1 (arXiv:2412.19437).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmodels import ops
from jaxmodels.layers.linear import Linear
from jaxmodels.layers.mixers.cache import KVCache, empty_cache, extend, tokens_seen
from jaxmodels.layers.mixers.inputs import (
    check_call,
    check_state,
    require_no_state_if_bidirectional,
    token_positions,
)
from jaxmodels.layers.normalization import RMSNorm
from jaxmodels.layers.positions import Rotary
from jaxmodels.ops.linear import linear
from jaxmodels.ops.rotary import rotary_angles, rotate
from jaxmodels.ops.segments import document_index
from jaxmodels.registry import register_mixer


class LatentMixer(nn.Module):
    """Attention whose keys and values are linear maps of a cached latent.

    c = norm(W_dkv x),   k_h = [W_uk,h c, R(W_kr x)],   v_h = W_uv,h c
    q_h = [W_uq,h c', R(W_qr,h c')],   c' = norm(W_dq x), or x without q_rank
    out = W_o concat_h(attention(q_h, k_h, v_h))

    R is the rotation by position. It has channels of its own, whose key is shared
    by all heads, so that all else is linear in c and the two maps of it move to the
    other side of their products where that is cheaper, as in decoding:

    q_h . W_uk,h c = (W_uk,h^T q_h) . c,   sum_s p_s W_uv,h c_s = W_uv,h sum_s p_s c_s

    The parameters are `q_down`, `q_norm` and `q_up`, or `q` without q_rank;
    `kv_down` (D, R + rope_dim), `kv_norm`, `kv_up` (R, heads * (nope_dim + value_dim))
    and `out`.

    Attributes:
      num_heads: H.
      q_rank: width of the queries' latent; None has none.
      kv_rank: R, width of the cached latent.
      nope_dim, rope_dim: channels of a head's query and key without and with rotation.
      value_dim: channels of a head's value.
      position: the rotation.
      scale: factor on q . k; None is m^2 / sqrt(nope_dim + rope_dim), where m is what
        `position` multiplies queries and keys by: YaRN's factor, or 1. DeepSeek has it
        on all channels, not on the turned ones alone.
      magnitude: factor on the turned channels, beyond `scale`.
      causal: hides tokens that follow.
      kernel_init: of all matrices.
      dtype: of the computation; parameters are float32.
    """

    num_heads: int = 4
    q_rank: int | None = None
    kv_rank: int = 64
    nope_dim: int = 32
    rope_dim: int = 16
    value_dim: int = 32
    position: Rotary = Rotary(layout="interleaved")
    scale: float | None = None
    magnitude: float = 1.0
    causal: bool = True
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: KVCache | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Mixes the sequence; see `jaxmodels.layers.mixers` for the signature.

        Raises:
          ValueError: shapes disagree, a state without room or of another batch,
            or a state without causality.
        """
        name = type(self).__name__
        check_call(name, x, positions, segment_ids)
        require_no_state_if_bidirectional(name, self.causal, state)
        self._check_position()
        q_nope, q_rope = self._queries(x)
        latent, k_rope = self._compress(x)
        kv_up = self._kv_up()
        if state is None:
            places = token_positions(x, positions, segment_ids)
            documents = None if segment_ids is None else document_index(segment_ids)
            options = {"causal": self.causal, "segment_ids": documents}
            frequencies = self.position.frequencies(self.rope_dim, places, documents)
            q_rope, k_rope = (self._turn(x, places, frequencies) for x in (q_rope, k_rope))
            out = self._expanded(q_nope, q_rope, latent, k_rope, kv_up, options)
            return self._merge(out, x.shape[-1]), None

        room = state.k.shape[1] if isinstance(state, KVCache) else 0
        check_state(name, state, jax.eval_shape(lambda: self.init_state(len(x), room, x.dtype)))
        places = token_positions(x, positions, segment_ids, tokens_seen(state))
        frequencies = self.position.frequencies(self.rope_dim, places, None)
        q_rope = self._turn(q_rope, places, frequencies)
        if not self.position.follows_length:
            k_rope = self._turn(k_rope, places, frequencies)
        state, seen = extend(state, k_rope, latent[:, :, None], places, segment_ids, name=name)
        latent, k_rope = seen.v[:, :, 0].astype(q_rope.dtype), seen.k.astype(q_rope.dtype)
        if self.position.follows_length:
            k_rope = self._turn(k_rope, seen.positions, frequencies)
        attend = self._absorbed if self._absorb(x.shape[1], room) else self._expanded
        out = attend(q_nope, q_rope, latent, k_rope, kv_up, {"mask": seen.mask})
        return self._merge(out, x.shape[-1]), state

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> KVCache:
        """A cache of `max_length` tokens, kv_rank + rope_dim numbers each.

        Its keys are the rotary keys, its values the latents; both have one head.
        """
        return empty_cache(batch, max_length, 1, (self.rope_dim, self.kv_rank), dtype)

    def _queries(self, x: Array) -> list[Array]:
        """(B, T, H, nope_dim), and (B, T, H, rope_dim) before rotation."""
        width = self.num_heads * (self.nope_dim + self.rope_dim)
        if self.q_rank is None:
            q = self._project(width, "q", x)
        else:
            latent = self._norm("q_norm", self._project(self.q_rank, "q_down", x))
            q = self._project(width, "q_up", latent)
        return jnp.split(q.reshape(*x.shape[:-1], self.num_heads, -1), [self.nope_dim], axis=-1)

    def _compress(self, x: Array) -> tuple[Array, Array]:
        """Latents (B, T, R), and rotary keys (B, T, 1, rope_dim) before rotation."""
        both = self._project(self.kv_rank + self.rope_dim, "kv_down", x)
        latent, k_rope = jnp.split(both, [self.kv_rank], axis=-1)
        return self._norm("kv_norm", latent), k_rope[:, :, None]

    def _expanded(self, q_nope, q_rope, latent, k_rope, kv_up, options) -> Array:
        """Attention with every head's keys and values in full; returns (B, T, H, value_dim)."""
        kv = linear(latent, kv_up).reshape(*latent.shape[:2], self.num_heads, -1)
        k_nope, v = jnp.split(kv, [self.nope_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], self.rope_dim))
        q, k = (jnp.concatenate(x, axis=-1) for x in ((q_nope, q_rope), (k_nope, k_rope)))
        return ops.dot_product_attention(q, k, v, scale=self._scale(), **options)

    def _absorbed(self, q_nope, q_rope, latent, k_rope, kv_up, options) -> Array:
        """The same with the latents themselves as keys and values of one head."""
        w_uk, w_uv = jnp.split(
            kv_up.reshape(self.kv_rank, self.num_heads, -1), [self.nope_dim], axis=-1
        )
        # As a bias, so that no array of latents and rotary keys side by side is made each step.
        rotary = self._scale() * jnp.einsum("bthk,bsgk->bhts", q_rope, k_rope)
        q_latent = jnp.einsum("bthk,rhk->bthr", q_nope, w_uk)
        latent = latent[:, :, None]
        mixed = ops.dot_product_attention(
            q_latent, latent, latent, bias=rotary, scale=self._scale(), **options
        )
        # Heads first, as products of many matrices come: asked for otherwise, XLA lays the
        # operands out anew, which makes this five times slower on CPU.
        return jnp.einsum("bthr,rhv->hbtv", mixed, w_uv).transpose(1, 2, 0, 3)

    def _absorb(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form takes fewer multiplications, a head."""
        maps = self.kv_rank * (self.nope_dim + self.value_dim)
        absorbed = queries * (maps + keys * (2 * self.kv_rank + self.rope_dim))
        return absorbed < keys * maps + queries * keys * (
            self.nope_dim + self.rope_dim + self.value_dim
        )

    def _turn(self, x: Array, places: Array, frequencies: Array) -> Array:
        """Rotary queries or keys (B, T, heads, rope_dim), turned."""
        return rotate(
            x,
            rotary_angles(places, frequencies),
            layout=self.position.layout,
            magnitude=self.magnitude,
        )

    def _scale(self) -> float:
        if self.scale is not None:
            return self.scale
        return self.position.magnitude**2 / (self.nope_dim + self.rope_dim) ** 0.5

    def _kv_up(self) -> Array:
        width = self.num_heads * (self.nope_dim + self.value_dim)
        kernel = _Kernel((self.kv_rank, width), self.kernel_init, name="kv_up")()
        return kernel.astype(self.dtype)

    def _merge(self, out: Array, width: int) -> Array:
        return self._project(width, "out", out.reshape(*out.shape[:-2], -1))

    def _project(self, width: int, name: str, x: Array) -> Array:
        project = Linear(
            width, use_bias=False, dtype=self.dtype, kernel_init=self.kernel_init, name=name
        )
        return project(x)

    def _norm(self, name: str, x: Array) -> Array:
        return RMSNorm(dtype=self.dtype, name=name)(x)

    def _check_position(self) -> None:
        if self.position.train_length is not None:
            raise ValueError(
                f"LatentMixer: position has train_length={self.position.train_length}, and log-n "
                f"scaling is not defined here; set it to None, or stretch by `scaling`"
            )


class _Kernel(nn.Module):
    """A matrix without a product of its own, since either side may take it."""

    shape: tuple[int, int]
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", self.kernel_init, self.shape)


@register_mixer
def latent(**overrides) -> LatentMixer:
    """Multi-head latent attention, whose cache is one latent and one rotary key a token."""
    return LatentMixer(**overrides)
