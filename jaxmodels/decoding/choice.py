"""How the next token is chosen from the logits, as one value that a compiled loop takes."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodels.ops.checks import require_within
from jaxmodels.ops.logit_filters import apply_filters, penalize_repetition


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "min_p", "repetition_penalty", "stop_tokens"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Choice:
    """A rule of choice. Numbers are traced: others need no other program.

    Attributes:
      temperature: of the draw; None takes the likeliest token.
      top_k, top_p, min_p, repetition_penalty: see `ops.logit_filters`; None for none.
      stop_tokens: that end a sequence.
    """

    temperature: Float[Array, ""] | None
    top_k: int | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    repetition_penalty: Float[Array, ""] | None
    stop_tokens: Int[Array, "N"]

    def filtered(
        self, logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None
    ) -> Float[Array, "*B V"]:
        """Logits of the distribution that is drawn from, or whose likeliest token is taken.

        Args:
          logits: the model's.
          seen: tokens that the text has already; read if there is a repetition penalty.
        """
        if self.repetition_penalty is not None:
            logits = penalize_repetition(logits, seen, self.repetition_penalty)
        if self.temperature is None:
            return logits
        return apply_filters(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )

    def token(
        self,
        logits: Float[Array, "*B V"],
        seen: Bool[Array, "*B V"] | None,
        key: Key[Array, ""] | None,
    ) -> Int[Array, "*B"]:
        """The next token; arguments as of `filtered`, and a key to draw with."""
        logits = self.filtered(logits, seen)
        if self.temperature is None:
            return likeliest(logits)
        # The largest after Gumbel noise is a draw from the softmax.
        return likeliest(logits + jax.random.gumbel(key, logits.shape, logits.dtype))

    def stops(self, tokens: Int[Array, "*B"]) -> Bool[Array, "*B"]:
        """Which of the tokens end their sequence."""
        return jnp.isin(tokens, self.stop_tokens)

    def first_seen(
        self, tokens: Int[Array, "B T"], real: Bool[Array, "B T"] | None, vocab_size: int
    ) -> Bool[Array, "B V"] | None:
        """The `seen` of prompts; None where nobody asks for it.

        Args:
          tokens: of the prompts.
          real: False on padding; None without any.
          vocab_size: V.
        """
        if self.repetition_penalty is None:
            return None
        rows = jnp.arange(len(tokens))[:, None]
        seen = jnp.zeros((len(tokens), vocab_size), bool)
        return seen.at[rows, tokens].max(True if real is None else real)


def likeliest(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The index of the largest logit, the first of equals.

    As `jnp.argmax`, which on a CPU goes through numbers one by one, and takes seven
    times as long as these two passes over vectors.
    """
    last = logits.shape[-1] - 1
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_top = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_top, places, last), axis=-1)


def make_choice(
    name: str,
    vocab_size: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop_tokens: Sequence[int],
    key: Key[Array, ""] | None,
) -> Choice:
    """Checks the options of a function that generates text, and makes a rule of them.

    Args:
      name: of the function, for the error.
      vocab_size: tokens are 0 to vocab_size - 1.
      temperature: 0 or more.
      top_k, top_p, min_p, repetition_penalty: as of `Choice`.
      stop_tokens: of the vocabulary.
      key: needed where temperature is above 0.

    Returns:
      The rule.

    Raises:
      ValueError: a number outside its range, a stop token outside the vocabulary,
        filters where nothing is drawn, or no key where something is.
    """
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    _check_draw(name, temperature, [f for f, value in filters.items() if value is not None], key)
    _check_ranges(name, filters, repetition_penalty)
    stops = np.array(stop_tokens, np.int32).reshape(-1)
    require_within(name, "stop_tokens", stops, 0, vocab_size - 1)

    def traced(value):
        return None if value is None else jnp.float32(value)

    return Choice(
        temperature=traced(temperature or None),
        top_k=top_k,
        top_p=traced(top_p),
        min_p=traced(min_p),
        repetition_penalty=traced(repetition_penalty),
        stop_tokens=jnp.asarray(stops),
    )


def _check_draw(name: str, temperature: float, filters: list[str], key: Array | None) -> None:
    require_within(name, "temperature", temperature, 0, float("inf"))
    if temperature == 0 and filters:
        raise ValueError(
            f"{name}: temperature=0 takes the likeliest token, which {', '.join(filters)} cannot "
            f"change; leave them out or give a temperature above 0"
        )
    if temperature > 0 and key is None:
        raise ValueError(
            f"{name}: temperature={temperature} draws tokens, which takes key=jax.random.key(...)"
        )


def _check_ranges(name: str, filters: dict[str, float | int | None], penalty: float | None) -> None:
    if filters["top_k"] is not None:
        require_within(name, "top_k", filters["top_k"], 1, float("inf"))
    if filters["top_p"] is not None:
        require_within(name, "top_p", filters["top_p"], 0, 1, open_low=True)
    if filters["min_p"] is not None:
        require_within(name, "min_p", filters["min_p"], 0, 1)
    if penalty is not None:
        require_within(name, "repetition_penalty", penalty, 0, float("inf"), open_low=True)
