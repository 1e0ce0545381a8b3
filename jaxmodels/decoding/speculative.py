"""Text from a language model, several tokens at a time: guessed, read at once and judged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxmodels.decoding.choice import make_choice
from jaxmodels.decoding.drafts import Draft
from jaxmodels.decoding.prompts import join_prompts
from jaxmodels.decoding.rounds import generate_in_rounds
from jaxmodels.decoding.states import is_cached
from jaxmodels.ops.checks import require_within


class Speculation(NamedTuple):
    """What was generated, and how well it was guessed.

    Fields:
      tokens, lengths: as of `Generation`.
      rounds: how many calls of the model, after the one that read the prompts, kept no
        guess, one guess, two, and so on; a batch keeps what all its rows accept.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    rounds: Int[Array, "P"]

    def sequences(self) -> list[list[int]]:
        """The new tokens of each row, without padding."""
        rows = zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)
        return [row[:length].tolist() for row, length in rows]


def tokens_a_round(rounds: Array | np.ndarray) -> float:
    """Kept guesses and the model's own token, in the mean over rounds; of a `Speculation`."""
    rounds = np.asarray(rounds)
    return 1 + float(rounds @ np.arange(len(rounds)) / max(rounds.sum(), 1))


def acceptance(rounds: Array | np.ndarray) -> Float[np.ndarray, "K"]:
    """How often the first, second ... guess was kept where those before it were."""
    reached = np.cumsum(np.asarray(rounds)[::-1])[::-1]
    return reached[1:] / np.maximum(reached[:-1], 1)


def speculative_generate(
    model: Any,
    variables: Mapping[str, Any],
    prompts: Sequence[Any] | np.ndarray | Array,
    draft: Draft,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_tokens: Sequence[int] = (),
    typical: tuple[float, float] | None = None,
    key: Key[Array, ""] | None = None,
    stream: Callable[[np.ndarray], object] | None = None,
) -> Speculation:
    """Continues prompts as `generate` does, with fewer calls of the model.

    A draft guesses the next tokens, the model reads them all in one call, and those
    that it accepts are kept, with one token of its own after them. Greedy text is that
    of `generate`; drawn text has the same distribution. All rows of a batch keep as
    many guesses, the least that any row accepts, which leaves the distribution as it
    is: a row's later guesses are dropped whatever they are.

    A state of caches is shortened after refused guesses. Any other, such as a
    recurrence's, is kept from before the round, and the kept tokens are read again.

    Args:
      model: a `LanguageModel`.
      variables: its parameters as {"params": ...}, with other collections it has.
      prompts: a sequence of tokens each; lengths may differ.
      draft: one of `decoding.drafts` or `decoding.head_drafts`. If its tree is no chain,
        the model's state must be caches alone.
      max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop_tokens, \
      key: as of `generate`.
      typical: (epsilon, delta) of `ops.speculative.accept_typical`, (0.09, 0.3) for
        instance: accepts what the model finds likely enough, which is faster, and no
        longer a draw from the model. None is exact.
      stream: called on the host with each step's (B,) tokens, those of a round one
        after the other; -1 for rows that have ended.

    Returns:
      The new tokens, and how many guesses were kept.

    Raises:
      ValueError: as `generate`; a draft of another vocabulary or a shorter context, a
        tree for a model that cannot read one, or typical acceptance where nothing is
        drawn.

    Source: Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1; trees from Miao et al.
    2024, "SpecInfer" (arXiv:2305.09781), and Cai et al. 2024, "Medusa" (arXiv:2401.10774).
    """
    name = "speculative_generate"
    joined = join_prompts(
        prompts,
        vocab_size=model.vocab_size,
        context=model.context,
        max_new_tokens=max_new_tokens,
        name=name,
    )
    choice = make_choice(
        name,
        model.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_tokens=stop_tokens,
        key=key,
    )
    _check_draft(model, draft, joined.tokens.shape[1] + max_new_tokens)
    bounds = _typical_bounds(typical, temperature)
    found = generate_in_rounds(
        model, max_new_tokens, variables, draft, joined, choice, bounds, key, stream
    )
    return Speculation(*found)


def _check_draft(model, draft: Draft, longest: int) -> None:
    if draft.vocab_size not in (None, model.vocab_size):
        raise ValueError(
            f"speculative_generate: the draft's vocab_size={draft.vocab_size} is not the model's "
            f"{model.vocab_size}; both must have the same tokenizer"
        )
    if draft.context is not None and draft.context < longest:
        raise ValueError(
            f"speculative_generate: the draft's context={draft.context} is less than the longest "
            f"prompt and max_new_tokens, {longest} together; ask for fewer tokens or take "
            f"another draft"
        )
    if not draft.tree.is_chain and not is_cached(jax.eval_shape(lambda: model.init_state(1, 2))):
        raise ValueError(
            "speculative_generate: the draft's tree has branches, which only states of "
            "caches can read at once, and this model's has others; give the draft a chain"
        )


def _typical_bounds(typical, temperature: float) -> Float[Array, "2"] | None:
    """Epsilon and delta as traced numbers, so that others need no other program."""
    if typical is None:
        return None
    require_within("speculative_generate", "typical", np.asarray(typical), 0, float("inf"))
    if temperature == 0:
        raise ValueError(
            f"speculative_generate: typical={typical} is a rule for drawn text, and temperature=0 "
            f"draws none; give a temperature above 0 or leave typical out"
        )
    return jnp.asarray(typical, jnp.float32)
