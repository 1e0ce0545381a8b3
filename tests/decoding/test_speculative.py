"""Speculative decoding: greedy text and options, against the model read without a state."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding.draft_cases import TREE, VOCABULARY, case, deepseek, made, medusa_heads, whole

from jaxmodels.decoding.drafts import ModelDraft, NgramDraft
from jaxmodels.decoding.generate import NO_TOKEN
from jaxmodels.decoding.head_drafts import MedusaDraft, ModuleDraft, MultiTokenDraft
from jaxmodels.decoding.rounds import _begin, _write
from jaxmodels.decoding.speculative import acceptance, speculative_generate, tokens_a_round
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.gpt2 import GPT2
from jaxmodels.ops.candidate_tree import chain

# Of the other kinds, those below make greedy text too.
GREEDY = ("itself", "recurrent model", "n-gram", "module", "modules", "multi_token", "medusa tree")
PROMPTS = ([3, 1, 4, 1, 5], [6], [2, 6])
NEW = 14


def greedy(model, variables, prompt, new, penalty=1.0):
    """What the definition says, token after token."""
    text = list(prompt)
    for _ in range(new):
        row = np.zeros((1, len(PROMPTS[0]) + NEW), np.int32)
        row[0, : len(text)] = text
        logits = np.array(whole(model)(variables, row)[0, len(text) - 1], np.float64)
        for token in {*text}:
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def until(tokens, stop):
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


@pytest.mark.parametrize("kind", GREEDY)
def test_greedy_text_is_the_models(kind):
    model, variables, draft = case(kind)
    found = speculative_generate(model, variables, PROMPTS, draft, max_new_tokens=NEW)
    wanted = [greedy(model, variables, prompt, NEW) for prompt in PROMPTS]
    assert found.sequences() == wanted
    assert all(len({*row}) > 2 for row in wanted)
    rounds = np.asarray(found.rounds)
    assert NEW - 1 <= rounds @ np.arange(1, draft.tree.depth + 2) <= NEW + draft.tree.depth
    if kind == "itself":
        assert rounds.tolist() == [0, 0, 0, 4]


@pytest.mark.parametrize(
    ("mixer", "kind"), [("linear", "itself"), ("sliding_window", "other"), ("linear", "n-gram")]
)
def test_states_that_cannot_be_shortened(mixer, kind):
    model, variables = made(mixer)
    draft = {
        "itself": ModelDraft(model, variables, 3),
        "other": ModelDraft(*made(mixer, width=10, seed=1, depth=1), 2),
        "n-gram": NgramDraft(2, 2),
    }[kind]
    found = speculative_generate(model, variables, PROMPTS, draft, max_new_tokens=NEW)
    assert found.sequences() == [greedy(model, variables, prompt, NEW) for prompt in PROMPTS]
    if kind == "itself":
        assert np.asarray(found.rounds).tolist() == [0, 0, 0, 4]


@pytest.mark.parametrize("kind", ["model", "multi_token tree"])
def test_options_are_those_of_generate(kind):
    """Penalty, stop tokens and streaming, with rows that end one before the other."""
    model, variables, draft = case(kind)
    plain = [greedy(model, variables, prompt, NEW, penalty=1.4) for prompt in PROMPTS]
    # Some row stops within the first tokens, and another does not.
    stop = next(t for t in range(VOCABULARY) if len({t in row[:9] for row in plain}) == 2)
    told = []
    found = speculative_generate(
        model,
        variables,
        PROMPTS,
        draft,
        max_new_tokens=NEW,
        repetition_penalty=1.4,
        stop_tokens=[stop],
        stream=told.append,
    )
    wanted = [until(row, stop) for row in plain]
    assert found.sequences() == wanted
    np.testing.assert_array_equal(found.lengths, [len(row) for row in wanted])
    for row, length in zip(found.tokens, found.lengths, strict=True):
        assert (row[length:] == NO_TOKEN).all()
    told = np.stack(told, axis=1)
    np.testing.assert_array_equal(told, found.tokens[:, : told.shape[1]])
    assert told.shape[1] == max(found.lengths)


def test_a_penalty_knows_the_guesses_on_the_way():
    model, variables, draft = case("itself")
    kept = 0
    for token in range(VOCABULARY):
        options = {"max_new_tokens": NEW, "repetition_penalty": 1.6}
        found = speculative_generate(model, variables, [[token]], draft, **options)
        assert found.sequences() == [greedy(model, variables, [token], NEW, penalty=1.6)]
        kept += int(found.rounds[1:].sum())
    assert kept > 5


def test_all_rows_may_stop_early():
    model, variables, draft = case("n-gram")
    first = [greedy(model, variables, prompt, 1)[0] for prompt in PROMPTS]
    found = speculative_generate(
        model, variables, PROMPTS, draft, max_new_tokens=NEW, stop_tokens=first
    )
    np.testing.assert_array_equal(found.lengths, [1, 1, 1])
    assert found.rounds.sum() == 0 and tokens_a_round(found.rounds) == 1


def test_typical_text_is_likely_and_longer():
    """What no rule could refuse is kept whole; what none could accept, not at all."""
    model, variables, draft = case("medusa tree")
    options = {"max_new_tokens": NEW, "temperature": 1.0, "key": jax.random.key(0)}
    generate = functools.partial(speculative_generate, model, variables, PROMPTS, draft, **options)
    assert generate(typical=(0.0, 0.0)).rounds[:-1].sum() == 0
    assert generate(typical=(1.0, 1e6)).rounds[1:].sum() == 0
    exact = tokens_a_round(generate().rounds)
    assert exact < tokens_a_round(generate(typical=(0.05, 0.2)).rounds) < TREE.depth + 1


def test_guesses_may_pass_the_end_of_the_context():
    """Positions are vectors of a table, which ends where the text does."""
    context = len(PROMPTS[0]) + NEW
    model = GPT2(width=12, depth=1, num_heads=2, vocab_size=VOCABULARY, context=context)
    variables = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))
    variables = jax.tree.map(lambda p: 20.0 * p, variables)
    draft = ModelDraft(model, variables, 4)
    found = speculative_generate(model, variables, PROMPTS[:1], draft, max_new_tokens=NEW)
    assert found.sequences() == [greedy(model, variables, PROMPTS[0], NEW)]


def test_values_do_not_recompile():
    model, variables, draft = case("medusa tree drawn")
    generate = functools.partial(speculative_generate, model, variables, max_new_tokens=3)
    generate(PROMPTS, draft, temperature=1.0, key=jax.random.key(0), stop_tokens=[1])
    sizes = [program._cache_size() for program in (_begin, _write)]
    draft = jax.tree.map(lambda p: p + 1, draft)
    generate(PROMPTS, draft, temperature=0.5, key=jax.random.key(1), stop_tokens=[2])
    assert [program._cache_size() for program in (_begin, _write)] == sizes


def test_acceptance_is_counted_by_depth():
    rounds = np.array([6, 0, 3, 1])
    np.testing.assert_allclose(acceptance(rounds), [0.4, 1.0, 0.25])
    assert tokens_a_round(rounds) == pytest.approx(1.9)
    np.testing.assert_array_equal(acceptance(np.zeros(3)), [0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[]]}, r"speculative_generate: prompts\[0\] is empty"),
        ({"prompts": [[7]]}, r"prompts\[0\] holds the token 7, outside \[0, vocab_size=7\)"),
        ({"temperature": -1.0}, r"speculative_generate: temperature holds -1"),
        ({"stop_tokens": [9]}, r"stop_tokens holds 9, outside \[0, 6\]"),
        ({"typical": (0.1, 0.3)}, r"typical=\(0.1, 0.3\) is a rule for drawn text"),
        ({"typical": (-0.1, 0.3), "temperature": 1.0}, r"typical holds -0.1"),
        (
            {"draft": ModelDraft(Decoder(width=8, depth=1, vocab_size=11), {}, 2)},
            r"the draft's vocab_size=11 is not the model's 7; both must have the same tokenizer",
        ),
        (
            {"draft": ModelDraft(Decoder(width=8, depth=1, vocab_size=7, context=8), {}, 2)},
            r"the draft's context=8 is less than .* 9 together",
        ),
        ({"model": "linear"}, r"the draft's tree has branches, which only states of caches"),
        (
            {"draft": MultiTokenDraft(*made(multi_token=True))},
            r"MultiTokenDraft: hidden \(1, 5, 12\) is not of 4 heads of width 12",
        ),
    ],
)
def test_bad_input(change, message):
    model, variables, draft = case("medusa tree")
    if change.get("model"):
        model, variables = made(change["model"])
    options = {"temperature": 0.0, "key": jax.random.key(0), **change}
    prompts, draft = options.pop("prompts", PROMPTS[:1]), options.pop("draft", draft)
    options.pop("model", None)
    with pytest.raises(ValueError, match=message):
        speculative_generate(model, variables, prompts, draft, max_new_tokens=4, **options)


def test_a_draft_of_modules_needs_one():
    with pytest.raises(ValueError, match=r"ModuleDraft: the model has num_ahead=0 modules"):
        ModuleDraft(deepseek(1)[0].clone(num_ahead=0), {})


def test_heads_must_reach_as_deep_as_the_tree():
    with pytest.raises(ValueError, match=r"MedusaDraft: a tree of depth 4 needs .* not 3"):
        MedusaDraft(*medusa_heads(), chain(4))
    model = made(multi_token=True)[0]
    with pytest.raises(ValueError, match=r"MultiTokenDraft: a tree of depth 5 .* not 3"):
        MultiTokenDraft(model, {}, chain(5))


def test_a_draft_that_is_the_model_is_never_refused():
    """Its state must be the model's after every round, or its draws would differ."""
    model, variables, draft = case("itself")
    found = speculative_generate(
        model,
        variables,
        PROMPTS,
        draft,
        max_new_tokens=61,
        temperature=3.0,
        key=jax.random.key(0),
    )
    assert np.asarray(found.rounds).tolist() == [0, 0, 0, 15]


def test_rows_that_have_ended_hold_no_other_up():
    model, variables, draft = case("model")
    generate = functools.partial(speculative_generate, model, variables, max_new_tokens=NEW)
    texts = [greedy(model, variables, [token], NEW) for token in range(VOCABULARY)]
    pairs = itertools.permutations(range(VOCABULARY), 2)
    for ended, other in [pair for pair in pairs if texts[pair[0]][0] not in texts[pair[1]]][:6]:
        stop = texts[ended][:1]
        both = generate([[ended], [other]], draft, stop_tokens=stop)
        alone = generate([[other]], draft, stop_tokens=stop)
        np.testing.assert_array_equal(both.rounds, alone.rounds)
