"""What the scripts about language models share: texts, training, judging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _language import bits_per_byte, held_out_bytes, text_sets, train_language_model

from jaxmodels import data
from jaxmodels.models.language.decoder import Decoder

MODEL = Decoder(width=16, depth=1, mixer_options={"num_heads": 2, "head_dim": 8})


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 6
    batch_size: int = 4
    learning_rate: float = 1e-2
    warmup: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 100


def test_texts_of_the_library_are_apart():
    parts = text_sets(None, 31)
    assert all(isinstance(part, data.ByteWindows) for part in parts)
    np.testing.assert_array_equal(parts[0].text, data.python_text("train"))
    np.testing.assert_array_equal(parts[1].text, data.python_text("test"))


def test_texts_of_a_folder_as_windows_and_as_packed_documents(tmp_path):
    names = [f"{n}.txt" for n in range(40)]
    for name in names:
        (tmp_path / name).write_text(f"the file {name} says ä")
    windows = [part.text.tobytes().decode(errors="replace") for part in text_sets(tmp_path, 7)]
    held_out = [name for name in names if f"file {name}" in windows[1]]
    assert 0 < len(held_out) < 20
    assert all((f"file {name}" in windows[0]) == (name not in held_out) for name in names)
    packed = text_sets(tmp_path, 31, data.ByteTokenizer())[1]
    texts = [data.ByteTokenizer().decode(document) for document in packed.documents]
    assert texts == [f"the file {name} says ä" for name in sorted(held_out)]


def test_a_single_text_is_cut_near_its_end(tmp_path):
    (tmp_path / "one.txt").write_text("abcdefgh" * 100)
    parts = text_sets(tmp_path / "one.txt", 7)
    assert [len(part.text) for part in parts] == [701, 101]  # each with its end


def test_library_documents_can_be_tokenized():
    packed = text_sets(None, 301, data.ByteTokenizer())[1]
    # The end of a document stands where the bytes have a zero.
    text = packed.documents.tokens[: len(data.python_text("test"))]
    assert np.mean(text == data.python_text("test")) > 0.9
    assert len(packed.documents) > 20


def test_bits_of_a_model_that_knows_nothing_are_eight(tmp_path):
    """All rows of the table alike: each of 256 bytes has the same probability."""
    variables = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), int))
    alike = {"embedding": jnp.ones((256, 16))}
    variables = {"params": {**variables["params"], "embed": alike}}
    windows = data.ByteWindows(np.arange(100, dtype=np.uint8), 7)
    found = bits_per_byte(MODEL, variables, windows, count=5, batch_size=2)
    assert type(found) is float  # results are written as JSON
    assert found == pytest.approx(8)
    documents = data.tokenize(["abc", "äöü" * 3, "d"], data.ByteTokenizer())
    packed = data.pack_documents(documents, 23)
    # 18 + 3 bytes and the ends of three documents; first bytes are no targets.
    bits = bits_per_byte(MODEL, variables, packed)
    assert bits == pytest.approx(8)
    # Characters cut in two by the missing first byte are told by a replacement of 3 bytes.
    counted = bits_per_byte(MODEL, variables, packed, tokenizer=data.ByteTokenizer())
    assert counted == pytest.approx(8 * (2 + 17 + 0 + 3) / (2 + 3 + 16))


def test_texts_that_are_judged():
    windows = data.ByteWindows(np.frombuffer(b"abcdefghij", np.uint8), 3)
    assert held_out_bytes(windows, count=2) == [b"bcd", b"hij"]
    documents = data.tokenize(["abc", "defg"], data.ByteTokenizer())
    padded = data.pad_documents(documents, 5)
    assert held_out_bytes(padded, tokenizer=data.ByteTokenizer()) == [b"bc", b"efg"]


def test_packed_documents_are_judged_apart():
    """A sequence of two documents costs what the two cost alone."""
    variables = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), int))
    documents = data.tokenize(["a text", "and another"], data.ByteTokenizer())
    together = bits_per_byte(MODEL, variables, data.pack_documents(documents, 17))
    apart = bits_per_byte(MODEL, variables, data.pad_documents(documents, 17))
    assert together == pytest.approx(apart, rel=1e-5)


def test_training_learns_goes_on_and_starts_anywhere(tmp_path):
    train_set = data.ByteWindows(np.frombuffer(b"abcab" * 200, np.uint8), 13)
    variables, seconds = train_language_model(Config(), MODEL, train_set, tmp_path / "a")
    learnt = bits_per_byte(MODEL, variables, train_set)
    assert seconds > 0 and learnt < 7
    again, longer = train_language_model(Config(), MODEL, train_set, tmp_path / "a")
    assert longer >= seconds
    jax.tree.map(np.testing.assert_array_equal, again, variables)

    def loss(params, batch, key):
        return MODEL.loss(params, batch, key)[:2]

    further, _ = train_language_model(
        Config(), MODEL, train_set, tmp_path / "b", loss=loss, start=variables
    )
    assert bits_per_byte(MODEL, further, train_set) < learnt
    # Still there: what a run starts from is not donated to it.
    assert bits_per_byte(MODEL, variables, train_set) == pytest.approx(learnt)
