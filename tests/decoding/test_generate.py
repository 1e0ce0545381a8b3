"""Generated text against `transformers`, and against runs without any cache."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import stats
from weights.torch_models import loaded, randomised

from jaxmodels.decoding import NO_TOKEN, generate
from jaxmodels.decoding.generate import _read, _write
from jaxmodels.models.language.decoder import Decoder

VOCAB, CONTEXT, NEW = 37, 31, 11
SIZES = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        **SIZES, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=3
    ),
    "llama": lambda: transformers.LlamaConfig(
        **SIZES,
        hidden_size=24,
        intermediate_size=41,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    ),
}
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, VOCAB, length).tolist() for length in (7, 3, 13)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each family theirs, and ours with the same weights and its variables."""
    pairs = {}
    for name, config in CONFIGS.items():
        # A seed with which the small GPT-2 does not say one token over and over.
        theirs = randomised(transformers.AutoModelForCausalLM.from_config(config()), seed=18)
        pairs[name] = theirs.eval(), *loaded(theirs, tmp_path_factory.mktemp(name))
    return pairs


def their_text(theirs, prompts, **options):
    """What they generate, padded on the left like ours."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
    )
    return out[:, longest:].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_of_unequal_prompts_is_that_of_transformers(models, name):
    theirs, model, variables = models[name]
    wanted = their_text(theirs, PROMPTS)
    assert len({tuple(row) for row in wanted}) == 3 and len(set(wanted[0])) > 3
    out = generate(model, variables, PROMPTS, max_new_tokens=NEW)
    assert out.sequences() == wanted
    np.testing.assert_array_equal(out.lengths, [NEW] * 3)


def test_repetition_penalty_and_stop_token_of_transformers(models):
    theirs, model, variables = models["gpt2"]
    prompts = [PROMPTS[0], PROMPTS[2][:7]]
    free = their_text(theirs, prompts, repetition_penalty=1.4)
    assert free != their_text(theirs, prompts)
    stop = [free[0][4], (free[0][4] + 1) % VOCAB]
    wanted = their_text(theirs, prompts, repetition_penalty=1.4, eos_token_id=stop)
    out = generate(
        model, variables, prompts, max_new_tokens=NEW, repetition_penalty=1.4, stop_tokens=stop
    )
    assert len(out.sequences()[0]) <= 5
    for ours, theirs_, tokens in zip(out.sequences(), wanted, out.tokens, strict=True):
        assert ours == theirs_[: len(ours)] and len(tokens) == NEW
        assert all(token == NO_TOKEN for token in tokens[len(ours) :])
        assert ours[-1] in stop or len(ours) == NEW


def test_padding_is_not_a_token_that_was_seen(models):
    """A row comes out as it does alone, with a penalty on its own tokens only.

    Token 0, which pads, changes its name with one that a padded row goes on to say.
    """
    theirs, model, variables = models["gpt2"]
    wanted = [their_text(theirs, [prompt], repetition_penalty=2.5)[0] for prompt in PROMPTS]
    names = np.arange(VOCAB)
    said = next(token for token in wanted[1] if token not in (0, *PROMPTS[1]))
    names[[0, said]] = said, 0
    flat = flatten_dict(variables["params"])
    tables = [path for path, leaf in flat.items() if leaf.shape[0] == VOCAB]
    assert len(tables) == 1
    renamed = unflatten_dict({**flat, tables[0]: flat[tables[0]][names]})
    prompts = [names[prompt] for prompt in PROMPTS]
    out = generate(model, {"params": renamed}, prompts, max_new_tokens=NEW, repetition_penalty=2.5)
    assert out.sequences() == [names[row].tolist() for row in wanted]


MIXERS = {
    "sliding_window": {"num_heads": 2, "head_dim": 6, "window": 5},
    "gated_delta": {"num_heads": 2, "head_dim": 6, "chunk_size": 8},
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_mixer_continues_as_without_a_cache(mixer):
    model = Decoder(
        width=28, depth=2, vocab_size=VOCAB, mixer=mixer, mixer_options=FrozenDict(MIXERS[mixer])
    )
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    variables = jax.tree.map(lambda x: 2 * x, variables)
    out = generate(model, variables, PROMPTS, max_new_tokens=NEW).sequences()
    assert len(np.unique(out)) > 5
    whole = jax.jit(lambda tokens: model.apply(variables, tokens)[0])
    for prompt, row in zip(PROMPTS, out, strict=True):
        # All tokens in one call; each is the likeliest after those before it.
        text = np.array([prompt + row + [0] * (CONTEXT - len(prompt) - NEW)])
        logits = np.asarray(whole(text))[0]
        assert row == logits.argmax(-1)[len(prompt) - 1 : len(prompt) + NEW - 1].tolist()


def test_draws_follow_the_filtered_distribution(models):
    """Chi-squared of the first and, given the first, of the second token."""
    theirs, model, variables = models["llama"]
    draws, prompt = 4000, PROMPTS[1]
    out = generate(
        model,
        variables,
        [prompt] * draws,
        max_new_tokens=2,
        temperature=1.7,
        top_k=9,
        top_p=0.83,
        min_p=0.05,
        key=jax.random.key(5),
    )
    tokens = np.asarray(out.tokens)
    common = np.bincount(tokens[:, 0]).argmax()
    for found, text in (
        (tokens[:, 0], prompt),
        (tokens[tokens[:, 0] == common, 1], [*prompt, int(common)]),
    ):
        scores = theirs(torch.tensor([text])).logits[:, -1].detach()
        for process in (
            transformers.TemperatureLogitsWarper(1.7),
            transformers.TopKLogitsWarper(9),
            transformers.TopPLogitsWarper(0.83),
            transformers.MinPLogitsWarper(0.05),
        ):
            scores = process(None, scores)
        wanted = scores.softmax(-1)[0].double().numpy()
        counts, kept = np.bincount(found, minlength=VOCAB), wanted > 0
        assert 3 <= kept.sum() < 9 and counts[~kept].sum() == 0
        expected = counts.sum() * wanted[kept] / wanted[kept].sum()
        assert stats.chisquare(counts[kept], expected).pvalue > 0.01


def flat_model():
    """A model to which all tokens are equally likely."""
    model = Decoder(width=8, depth=1, vocab_size=5, mixer_options=FrozenDict(head_dim=2))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    return model, jax.tree.map(jnp.zeros_like, variables)


def test_steps_and_rows_draw_independently():
    model, variables = flat_model()

    def draw(key):
        return np.asarray(
            generate(
                model,
                variables,
                [[1, 2]] * 400,
                max_new_tokens=3,
                temperature=1.0,
                key=jax.random.key(key),
            ).tokens
        )

    tokens = draw(0)
    np.testing.assert_array_equal(tokens, draw(0))
    assert (tokens != draw(1)).any()
    for first, second in ((tokens[:, 0], tokens[:, 1]), (tokens[:-1, 2], tokens[1:, 2])):
        pairs = np.bincount(5 * first + second, minlength=25)
        assert stats.chisquare(pairs).pvalue > 0.01


def test_streams_each_step_and_ends_when_all_rows_have():
    model, variables = flat_model()
    heard = []
    options = {"temperature": 1.0, "key": jax.random.key(3), "stop_tokens": [2, 4]}
    out = generate(
        model, variables, [[1, 2]] * 3, max_new_tokens=41, **options, stream=heard.append
    )
    lengths = np.asarray(out.lengths)
    assert len(set(lengths.tolist())) > 1 and len(heard) == lengths.max() < 41
    np.testing.assert_array_equal(np.stack(heard, 1), out.tokens[:, : len(heard)])
    assert all(tokens.shape == (3,) for tokens in heard)
    for row, length in zip(np.asarray(out.tokens), lengths, strict=True):
        assert row[length - 1] in (2, 4) and not np.isin(row[: length - 1], (2, 4)).any()
        assert (row[length:] == NO_TOKEN).all()


def test_the_compiled_loop_takes_no_step_after_all_rows_have_ended(monkeypatch):
    model, variables = flat_model()
    loops = []

    def write(*args):
        loops.append(_write(*args))
        return loops[-1]

    monkeypatch.setattr(importlib.import_module("jaxmodels.decoding.generate"), "_write", write)
    options = {"temperature": 1.0, "key": jax.random.key(3), "stop_tokens": [2, 4]}
    out = generate(model, variables, [[1, 2]] * 3, max_new_tokens=41, **options)
    assert loops[0].step == out.lengths.max() < 41


def test_what_a_listener_raises_comes_out():
    model, variables = flat_model()

    def listen(tokens):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        generate(model, variables, [[1, 2]] * 3, max_new_tokens=41, stream=listen)


def test_compiles_anew_for_new_shapes_only():
    model, variables = flat_model()

    def program(prompts=([1, 2], [3]), **changes):
        options = {"max_new_tokens": 2, "temperature": 1.0, "key": jax.random.key(0)}
        options |= {"stop_tokens": [1], "top_p": 0.5, "stream": print, **changes}
        generate(model, variables, list(prompts), **options)
        return _read._cache_size(), _write._cache_size()

    first = program()
    assert first == program(([4], [0, 0]), key=jax.random.key(1), temperature=0.3)
    assert first == program(top_p=0.1, stop_tokens=[3], stream=lambda tokens: None)
    assert program(max_new_tokens=3) == (first[0] + 1, first[1] + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "generate: prompts is empty"),
        ({"prompts": [[1], []]}, r"generate: prompts\[1\] is empty"),
        ({"prompts": [1, 2]}, r"prompts\[0\] has shape \(\); .* pass a single one as \[prompt\]"),
        ({"prompts": [[0.5]]}, r"prompts\[0\] is of float64, not integers"),
        ({"prompts": [[1, VOCAB]]}, r"holds the token 37, outside \[0, vocab_size=37\)"),
        ({"prompts": [[-1]]}, "holds the token -1, outside"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        (
            {"prompts": [[1], [2] * 27], "max_new_tokens": 5},
            r"prompts\[1\] of 27 tokens and max_new_tokens=5 exceed the model's context=31; "
            "shorten the prompt, or ask for 4 new tokens",
        ),
        ({"prompts": [[2] * 50]}, "ask for 0 new tokens"),
        ({"temperature": -0.5}, r"generate: temperature holds -0.5, outside \[0, inf\]"),
        ({"temperature": 0.5}, r"temperature=0.5 draws tokens, which takes key"),
        ({"top_k": 3, "min_p": 0.1}, "likeliest token, which top_k, min_p cannot change"),
        ({"temperature": 1.0, "top_k": 0}, r"generate: top_k holds 0, outside \[1, inf\]"),
        ({"temperature": 1.0, "top_p": 0.0}, r"generate: top_p holds 0, outside \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.1}, r"generate: top_p holds 1.1, outside \(0, 1\]"),
        ({"temperature": 1.0, "min_p": 1.1}, r"generate: min_p holds 1.1, outside \[0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty holds 0, outside \(0, inf\]"),
        ({"stop_tokens": [3, VOCAB]}, r"generate: stop_tokens holds 37, outside \[0, 36\]"),
        ({"stop_tokens": [-1]}, "generate: stop_tokens holds -1"),
    ],
)
def test_bad_input_is_named(changes, message):
    model = Decoder(width=8, depth=1, vocab_size=VOCAB, context=CONTEXT)
    options = {"max_new_tokens": 2, "prompts": [[1]], **changes}
    if "temperature" in changes and "key" not in message:
        options["key"] = jax.random.key(0)
    with pytest.raises(ValueError, match=message):
        generate(model, {}, options.pop("prompts"), **options)
