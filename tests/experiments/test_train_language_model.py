"""The script that trains language models: any family, a short run, a folder, misuse."""

import gzip
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import save_pretrained
from jaxmodels.models.language.llama import Llama

NAME = "train_language_model.py"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / NAME))
FAMILIES = ("decoder", *SCRIPT["SMALL"])


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_a_size_for_two_cores(family):
    config = SCRIPT["Config"](model=family)
    model, start, tokenizer = SCRIPT["load_model"](config)
    assert start is None and tokenizer is None
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32))
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    batch = {name: jnp.zeros((2, 7), jnp.int32) for name in ("tokens", "targets")}
    loss, terms, _ = jax.eval_shape(model.loss, params, batch, jax.random.key(0), state)
    assert loss.shape == () and "cross_entropy" in terms
    every = sum(leaf.size for leaf in jax.tree.leaves(params))
    active = SCRIPT["active_parameters"](model, params)
    assert 5e5 < active <= every < 1e7
    assert (active < every) == (family not in ("decoder", "llama", "qwen3"))


def test_tables_that_are_looked_up_and_idle_experts_are_not_counted():
    tied = Llama(4, 1, 2, 1, 5, vocab_size=11, tied=True)
    untied = tied.clone(tied=False)

    def active(model):
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))
        return SCRIPT["active_parameters"](model, variables["params"])

    norms, attention, mlp = 3 * 4, 4 * 4 * 2 + 4 * 2 * 2, 3 * 4 * 5
    assert active(tied) == active(untied) == norms + attention + mlp + 4 * 11

    class Experts:
        num_experts, top_k = 8, 2

    params = {"block_0": {"up": np.zeros((8, 3, 5)), "router": np.zeros((3, 8))}}
    assert SCRIPT["active_parameters"](Experts(), params) == 2 * 3 * 5 + 24


def test_compressors_code_each_text_by_itself():
    texts = [b"abcabcabc" * 30, b"xyz" * 100]
    bits = {n: SCRIPT["compressed_bits"](c, texts) for n, c in SCRIPT["COMPRESSORS"].items()}
    assert bits["gzip"] == 8 * sum(len(gzip.compress(t, 9, mtime=0)) for t in texts) / 570
    assert 0 < bits["LZMA"] < bits["gzip"] < 2


def test_the_claim_follows_the_numbers():
    model = Llama(4, 1, 2, 1, 5, vocab_size=11)
    params, config = {"block_0": np.zeros((3, 5))}, SCRIPT["Config"](steps=10)
    for bits, holds in ((1.9, True), (2.1, False), (2.6, False)):
        figures = {"the model": bits, "gzip": 2.5, "LZMA": 2.0}
        result = SCRIPT["conclude"](config, model, params, figures, 2.0)
        assert result.holds == holds
        assert result.measured["bits per byte, the model"] == bits
        assert result.measured["tokens per second"] == 10 * 16 * 256 / 2
        share = result.measured["FLOP utilisation"] * result.measured["GFLOP/s at most"]
        np.testing.assert_allclose(share, 6 * 15 * 10 * 16 * 256 / 2 / 1e9)


def test_fine_tunes_a_folder_on_a_text_and_writes_what_it_promises(launch, tmp_path):
    """The folder holds a model of bytes without a tokenizer; so does what comes out."""
    model = Llama(16, 2, 2, 1, 24, vocab_size=256, tied=True, context=64)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), int))
    save_pretrained(model, variables, tmp_path / "model")
    (tmp_path / "text.txt").write_text("to be or not to be, " * 200)
    size = ("--length", 32, "--batch-size", 4, "--steps", 30, "--held-out-windows", 5)
    rest = ("--prompt", "to", "--samples", 2, "--sample-tokens", 9, "--folder", "run")
    files = ("--data", "text.txt", "--pretrained", "model", "--learning-rate", 3e-2)
    _, errors = (process := launch(NAME, *files, *size, *rest, cwd=tmp_path)).communicate()
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["measured"]
    assert measured["bits per byte, the model"] < 7
    assert measured["bits per byte, gzip"] > 2
    assert 0 < measured["FLOP utilisation"] < 1
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert samples.count("=== temperature 0.8\nto") == 2 and "=== likeliest\nto" in samples
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["vocab_size"] == 256
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mixer", "gla"), "mixer=gla: llama has a mixer of its own; pass --model decoder"),
        (("--width", "20"), "width=20 must be a multiple of twice the 4 num_heads"),
        (("--data", "nowhere"), "read_documents: 'nowhere' does not exist"),
        (("--pretrained", "nowhere"), "nowhere"),
        (("--steps", "0"), "steps=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_message(flags, message, refused):
    assert message in refused(NAME, *flags)
