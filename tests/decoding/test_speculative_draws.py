"""Text that speculative decoding draws has the distribution of the model alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding.draft_cases import VOCABULARY, case, whole
from scipy import stats

from jaxmodels.decoding.speculative import speculative_generate


def distribution(model, variables, prompt, new):
    """Of all texts of `new` tokens, at temperature 3 and among the five likeliest tokens."""
    texts = np.array([*itertools.product(range(VOCABULARY), repeat=new)])
    rows = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    logits = np.asarray(whole(model)(variables, jnp.asarray(rows)), np.float64)
    logits = logits[:, len(prompt) - 1 :] / 3
    logits[logits < np.sort(logits, axis=-1)[..., -5, None]] = -np.inf
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    of_tokens = [p[np.arange(len(texts)), place, texts[:, place]] for place in range(new)]
    return np.prod(of_tokens, axis=0)


def pvalue(found, expected):
    """Of a chi-squared test, with rare texts taken together."""
    codes = found @ VOCABULARY ** np.arange(found.shape[1])[::-1]
    counts = np.bincount(codes, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    common = expected * len(found) > 10
    wanted = expected / expected.sum() * len(found)
    pairs = [np.append(x[common], x[~common].sum()) for x in (counts, wanted)]
    return stats.chisquare(*(x[pairs[1] > 0] for x in pairs)).pvalue


# Each kind of draft and each rule; of trees and of greedy text `test_speculative` has more.
KINDS = (
    "model",
    "recurrent model",
    "n-gram",
    "module",
    "multi_token drawn",
    "medusa tree",
    "medusa tree drawn",
)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_text_has_the_models_distribution(kind):
    """50,000 draws of three tokens; once of two prompts, whose rows wait for each other."""
    model, variables, draft = case(kind)
    prompts, new = ([3, 1], [6])[: 1 + (kind == "model")], 3

    def draw(key):
        out = speculative_generate(
            model, variables, prompts, draft, max_new_tokens=new, temperature=3.0, top_k=5, key=key
        )
        return out.tokens, out.rounds

    keys = jax.random.split(jax.random.key(11), 50_000)
    tokens, rounds = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=25_000))(keys)
    for row, prompt in enumerate(prompts):
        expected = distribution(model, variables, prompt, new)
        assert pvalue(np.asarray(tokens[:, row]), expected) > 0.01
    # Guesses did take part.
    assert rounds[:, 1:].sum() > 1_000
