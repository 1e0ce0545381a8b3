"""What drafts propose: n-grams against a search in plain Python, heads against their logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding.draft_cases import TREE, VOCABULARY, deepseek
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxmodels.decoding.choice import make_choice
from jaxmodels.decoding.drafts import NgramDraft, Text, pick
from jaxmodels.decoding.head_drafts import ModuleDraft, candidates

ROOM = 29
OPTIONS = {"top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None}


def rule(temperature, **options):
    key = jax.random.key(0)
    options = {**OPTIONS, "stop_tokens": (), "key": key, **options}
    return make_choice("test", VOCABULARY, temperature=temperature, **options)


def read_on(tokens, length, longest):
    """The place to go on from that agrees the furthest, the last of them; then its text."""

    def agreement(place):
        count = 0
        while count < min(longest, place) and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count

    place = max(range(1, len(tokens)), key=lambda place: (agreement(place), place))
    text = list(tokens)
    for step in range(length):
        text.append(text[place + step])
    return text[len(tokens) :]


propose = jax.jit(lambda draft, text: draft.propose(None, text, None, None)[0].tokens)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=ROOM - 6), st.integers(0, 1000))
def test_ngrams_read_on_where_text_agrees_the_furthest(tokens, seed):
    draft = NgramDraft(length=5, longest=4)
    # What lies in the room behind the text must not matter.
    row = np.random.default_rng(seed).integers(0, 3, ROOM)
    row[: len(tokens)] = tokens
    rows = jnp.asarray(np.stack([row, row[::-1]]))
    text = Text(rows, jnp.int32(len(tokens)), jnp.zeros(2, jnp.int32))
    found = propose(draft, text)
    np.testing.assert_array_equal(found[0], read_on(tokens, 5, 4))
    other = np.asarray(rows[1, : len(tokens)]).tolist()
    np.testing.assert_array_equal(found[1], read_on(other, 5, 4))


def test_heads_guess_their_likeliest_tokens():
    logits = jax.random.normal(jax.random.key(0), (5, 3, VOCABULARY))
    guesses = candidates(TREE, logits, rule(0.0), None)
    assert guesses.probabilities is None
    order = np.argsort(-np.asarray(logits), axis=-1)
    for number, node in enumerate(TREE.nodes[1:]):
        wanted = order[:, len(node) - 1, node[-1]]
        np.testing.assert_array_equal(guesses.tokens[:, number], wanted)


def test_drawn_guesses_follow_what_is_left():
    """Ranks are draws without putting back; the distributions given are those of the draws."""
    rows = 20_000
    logits = jax.random.normal(jax.random.key(1), (1, 3, VOCABULARY))
    choice = rule(0.8, top_k=5)
    guesses = jax.jit(candidates, static_argnums=0)(
        TREE, jnp.broadcast_to(logits, (rows, 3, VOCABULARY)), choice, jax.random.key(2)
    )
    scores = np.asarray(logits[0], np.float64) / 0.8
    scores[scores < np.sort(scores, axis=-1)[:, -5, None]] = -np.inf
    p = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    tokens, drafted = np.asarray(guesses.tokens), np.asarray(guesses.probabilities)
    nodes = {node: number for number, node in enumerate(TREE.nodes[1:])}
    np.testing.assert_allclose(drafted[:, nodes[(0,)]], np.tile(p[0], (rows, 1)), atol=1e-6)
    for first in range(VOCABULARY):
        chosen = tokens[:, nodes[(0,)]] == first
        if not chosen.any():
            assert p[0, first] == 0
            continue
        left = p[0].copy()
        left[first] = 0
        left /= left.sum()
        np.testing.assert_allclose(
            drafted[chosen, nodes[(1,)]], np.tile(left, (chosen.sum(), 1)), atol=1e-6
        )
        counts = np.bincount(tokens[chosen, nodes[(1,)]], minlength=VOCABULARY)
        assert counts[left == 0].sum() == 0
        if chosen.sum() > 1000:
            expected = chosen.sum() * left[left > 0]
            assert stats.chisquare(counts[left > 0], expected).pvalue > 0.01
    # The same token at a place, whichever way leads there.
    np.testing.assert_array_equal(tokens[:, nodes[(0, 0)]], tokens[:, nodes[(1, 0)]])


def test_guesses_that_filters_leave_no_choice_are_certain():
    logits = jax.random.normal(jax.random.key(1), (4, 3, VOCABULARY))
    guesses = candidates(TREE, logits, rule(1.0, top_k=1), jax.random.key(2))
    certain = np.eye(VOCABULARY)[np.asarray(guesses.tokens)]
    np.testing.assert_array_equal(guesses.probabilities, certain)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_models_guess_and_its_distribution(temperature):
    logits = jax.random.normal(jax.random.key(3), (5, VOCABULARY))
    choice = dataclasses.replace(rule(temperature), stop_tokens=jnp.array([1]))
    token, probabilities = pick(choice, logits, jax.random.key(4))
    if temperature == 0:
        assert probabilities is None
        np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))
    else:
        scores = np.exp(np.asarray(logits, np.float64) / temperature)
        wanted = scores / scores.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(probabilities, wanted, rtol=1e-5)


@functools.cache
def readers(model):
    """Without a state: what the model has of a text, a module of it, and what is likeliest."""

    def ahead(variables, hidden, tokens, number):
        return model.apply(variables, hidden, tokens, number, method="predict_ahead")[0]

    def best(variables, vector):
        return jnp.argmax(model.apply(variables, vector, method="logits"))

    hidden = functools.partial(model.apply, method="hidden")
    return jax.jit(hidden), jax.jit(ahead, static_argnums=3), jax.jit(best)


def modules_by_definition(model, variables, known, length):
    """Greedy guesses after a text, all read anew for each one; what follows it is not seen."""
    read, ahead, best = readers(model)
    text, last = np.zeros(ROOM + 8, np.int32), len(known) - 2
    text[: len(known)] = known
    vectors, _ = read(variables, text[None, :ROOM])
    for step in range(length):
        number = min(step, model.num_ahead - 1)
        if step == number:
            inputs = vectors
        else:
            last += 1
            inputs = inputs.at[:, last].set(vectors[:, last - 1])
        vectors = ahead(variables, inputs, text[None, number + 1 :][:, :ROOM], number)
        text[len(known) + step] = best(variables, vectors[0, last])
    return text[len(known) :][:length].tolist()


@pytest.mark.parametrize(("num_ahead", "length"), [(1, 3), (3, 5)])
def test_modules_guess_what_they_say_of_the_whole_text(num_ahead, length):
    """Whatever was guessed and refused before, and with prompts shorter than modules are many."""
    model, variables = deepseek(num_ahead)
    draft = ModuleDraft(model, variables, length)
    rng, rounds, prompts = np.random.default_rng(0), (1, 2, 1, length + 1, 2), (1, 4)
    start, most = max(prompts), max(prompts) + 1 + sum(rounds)
    texts = [rng.integers(0, VOCABULARY, most - start + prompt) for prompt in prompts]
    rows = np.stack([np.pad(text, (most - len(text), length + 1)) for text in texts])
    padding = jnp.asarray(start - np.array(prompts))
    read = readers(model)[0]
    hidden = np.zeros((len(prompts), rows.shape[1], model.width), np.float32)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        hidden[row, start - prompt : most] = read(variables, text[None])[0][0]

    def certain(number):
        return Text(jnp.asarray(rows), jnp.int32(number), padding)

    @jax.jit
    def advance(memory, number, vectors, count):
        memory = draft.follow(memory, certain(number), vectors, count)
        return draft.propose(memory, certain(number), rule(0.0), None)

    number = start + 1
    memory = draft.start(certain(number), None, jnp.asarray(hidden[:, :start]), rows.shape[1])
    guesses, memory = draft.propose(memory, certain(number), rule(0.0), None)
    seen = set()
    for count in rounds:
        for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            known = text[: number - start + prompt]
            wanted = modules_by_definition(model, variables, known, length)
            assert guesses.tokens[row].tolist() == wanted
            seen.update(wanted)
        vectors = hidden[:, number - 1 : number + length].copy()
        vectors[:, count:] = 100.0  # of guesses that were refused
        number += count
        guesses, memory = advance(memory, number, jnp.asarray(vectors), count)
    assert len(seen) > 2
