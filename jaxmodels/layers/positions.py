"""How the places of query and key enter softmax attention, as exchangeable values.

A scheme has one method, which the softmax mixer calls:

    out = scheme.attend(q, k, v, q_positions, k_positions, causal=..., window=...,
                        mask=..., segment_ids=..., scale=..., softcap=..., sinks=...)

q (B, T, H, K), k and v (B, S, G, K) and (B, S, G, V), positions (B, T) and (B, S);
the options are those of `ops.dot_product_attention`. What it does to a key by the
key's place alone may be a second method, `keys(k, k_positions)`; `attend` then takes
the keys that this returns, which is what a cache holds. Schemes here have no
parameters: a model trained with `Rotary()` takes any `Rotary(scaling=...)`,
`Rotary(train_length=...)` or `ReRope(...)` afterwards, by building it again with
another `position`. Schemes that add a bias are in `layers.position_biases`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels import ops
from jaxmodels.layers.rotary_scaling import DynamicNtk, Scaling
from jaxmodels.ops.rerope import rerope_attention
from jaxmodels.ops.rotary import rotary_angles, rotary_frequencies, rotate, xpos_scales
from jaxmodels.ops.rotary_scaling import log_n_scale
from jaxmodels.ops.segments import document_index


@dataclasses.dataclass(frozen=True)
class NoPositions:
    """Attention that only causality tells the order (NoPE).

    Attributes:
      train_length: scales queries beyond it by log-n; None does not.

    Source: Kazemnejad et al. 2023 (arXiv:2305.19466).
    """

    train_length: int | None = None

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see the module for the arguments."""
        return ops.dot_product_attention(_log_n(q, q_positions, self), k, v, **options)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions, plain or stretched; keys are cached turned, if they can be.

    Attributes:
      base: see `ops.rotary.rotary_frequencies`.
      fraction: of a head's channels that turn; the first ones do.
      layout: how channels pair up, "half" or "interleaved".
      scaling: a value of `layers.rotary_scaling`, for contexts beyond training.
      train_length: scales queries beyond it by log-n; None does not.

    Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864); partial as in GPT-J.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    layout: str = "half"
    scaling: Scaling | None = None
    train_length: int | None = None

    def keys(
        self, k: Float[Array, "B S G K"], k_positions: Int[Array, "B S"]
    ) -> Float[Array, "B S G K"]:
        """Keys turned by their places, or as they are if the length so far matters too."""
        if self.follows_length:
            return k
        frequencies = self.frequencies(k.shape[-1], k_positions, None)
        return self.turn(k, rotary_angles(k_positions, frequencies))

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see the module for the arguments."""
        frequencies = self.frequencies(q.shape[-1], q_positions, options.get("segment_ids"))
        q = self.turn(_log_n(q, q_positions, self), rotary_angles(q_positions, frequencies))
        if self.follows_length:
            k = self.turn(k, rotary_angles(k_positions, frequencies))
        return ops.dot_product_attention(q, k, v, **options)

    @property
    def follows_length(self) -> bool:
        """Whether a key's turn changes while the sequence grows, as with `DynamicNtk`."""
        return isinstance(self.scaling, DynamicNtk)

    @property
    def magnitude(self) -> float:
        """Factor on turned channels, which YaRN makes other than one."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor

    def turn(
        self,
        x: Float[Array, "B T H K"],
        angles: Float[Array, "B T N"],
        fade: float | Float[Array, "B T N"] = 1.0,
    ) -> Float[Array, "B T H K"]:
        """Queries or keys turned by the angles, and faded if so asked."""
        return rotate(x, angles, layout=self.layout, magnitude=fade * self.magnitude)

    def frequencies(
        self,
        head_dim: int,
        q_positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "*#C N"]:
        """Those of queries and keys: (N,), or (B, T, N) or (B, 1, N) with `DynamicNtk`.

        Raises:
          ValueError: fraction is outside (0, 1] or leaves an odd number of channels.
        """
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Rotary: fraction={self.fraction} must be in (0, 1]")
        width = int(head_dim * self.fraction)
        if self.scaling is None:
            return rotary_frequencies(width, self.base)
        return self.scaling.frequencies(width, self.base, _lengths(q_positions, segment_ids))


@dataclasses.dataclass(frozen=True)
class XPos:
    """Rotary positions whose products fade with distance; a model is trained with them.

    Attributes:
      rotary: the rotation; its scaling and log-n work as they do alone.
      scale_base: distance over which the fastest pair of channels fades by 0.4 / 1.4.

    Source: Sun et al. 2022, "A Length-Extrapolatable Transformer", section 3.2
    (arXiv:2212.10554). Its blockwise causal attention is the mixer's `window`.
    """

    rotary: Rotary = Rotary(layout="interleaved")
    scale_base: float = 512.0

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see the module for the arguments."""
        rotary = self.rotary
        frequencies = rotary.frequencies(q.shape[-1], q_positions, options.get("segment_ids"))
        width = 2 * frequencies.shape[-1]
        # A shift common to queries and keys changes no product, but keeps powers small.
        middle = jnp.max(q_positions, axis=1, keepdims=True) // 2
        q_fade, k_fade = (
            xpos_scales(places, width, scale_base=self.scale_base)
            for places in (q_positions - middle, middle - k_positions)
        )
        q = rotary.turn(
            _log_n(q, q_positions, rotary), rotary_angles(q_positions, frequencies), q_fade
        )
        k = rotary.turn(k, rotary_angles(k_positions, frequencies), k_fade)
        return ops.dot_product_attention(q, k, v, **options)


@dataclasses.dataclass(frozen=True)
class ReRope:
    """Rotary positions rectified beyond a window, for a model trained with `rotary`.

    Attributes:
      window: distance from which on positions do not grow, or grow `leak` times
        slower; less than the trained length, half of it for instance.
      leak: None is ReRoPE; a number is Leaky ReRoPE. So that no distance exceeds
        the trained length N at length L, it is at least (L - window) / (N - window).
      rotary: that the model was trained with; its log-n works as it does alone.

    Source: Su 2023, "Rectified Rotary Position Embeddings" (kexue.fm/archives/9708);
    see `ops.rerope`. As there, causal attention only.
    """

    window: int
    leak: float | None = None
    rotary: Rotary = Rotary()

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
        **options,
    ) -> Float[Array, "B T H V"]:
        """Mixes values; see the module for the arguments."""
        rotary = self.rotary
        return rerope_attention(
            _log_n(q, q_positions, rotary),
            k,
            v,
            q_positions,
            k_positions,
            rotary.frequencies(q.shape[-1], q_positions, options.get("segment_ids")),
            rectify_at=self.window,
            leak=self.leak,
            layout=rotary.layout,
            magnitude=rotary.magnitude,
            **options,
        )


def hybrid_window_full(
    depth: int, *, window: int, train_length: int, full: int = 1, rotary: Rotary = Rotary()
) -> tuple[dict, ...]:
    """HWFA: windowed rotary layers, then full layers without positions but with log-n.

    No layer sees a distance or, by log-n, an entropy beyond training, and yet the
    last ones reach all of the context. A model is trained this way.

    Args:
      depth: layers of the model.
      window: keys to the left that a windowed layer sees.
      train_length: that the model is trained with.
      full: how many of the last layers are full.
      rotary: positions of the windowed layers.

    Returns:
      `position` and `window` of the softmax mixer of each layer.

    Raises:
      ValueError: full is not in [0, depth].

    Source: Su 2023, "A new idea for global length extrapolation"
    (kexue.fm/archives/9603).
    """
    if not 0 <= full <= depth:
        raise ValueError(f"hybrid_window_full: full={full} must be in [0, depth={depth}]")
    windowed = {"position": rotary, "window": window}
    global_ = {"position": NoPositions(train_length), "window": None}
    return (windowed,) * (depth - full) + (global_,) * full


def attended_keys(
    scheme: Any, k: Float[Array, "B S G K"], k_positions: Int[Array, "B S"]
) -> Float[Array, "B S G K"]:
    """Keys as `scheme.attend` takes them and a cache holds them."""
    return scheme.keys(k, k_positions) if hasattr(scheme, "keys") else k


def _log_n(q: Array, positions: Array, scheme: Rotary | NoPositions) -> Array:
    if scheme.train_length is None:
        return q
    return (q * log_n_scale(positions, scheme.train_length)[..., None, None]).astype(q.dtype)


def _lengths(positions: Array, segment_ids: Array | None) -> Array:
    """One more than the last position of each token's document; (B, T), or (B, 1) if one."""
    if segment_ids is None:
        return jnp.max(positions, axis=1, keepdims=True) + 1
    documents = document_index(segment_ids)
    number = positions.shape[1]
    longest = jax.vmap(lambda x, i: jax.ops.segment_max(x, i, num_segments=number)[i])
    return longest(positions, documents) + 1
