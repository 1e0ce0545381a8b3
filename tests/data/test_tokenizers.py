"""Tokenizers against UTF-8 itself and against `transformers` reading the same folder."""

import json
import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.data import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

TEXTS = ("low lower lowest", "new newer newest\n", "  wide\twider 1984", "naïve café, 東京 🙂", "")


@settings(deadline=None)
@given(st.text(max_size=20))
def test_bytes_are_utf8_and_come_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    # No text contains what stands for the special tokens.
    assert not {tokenizer.begin_id, tokenizer.end_id} & {*ids.tolist()}
    around = [tokenizer.begin_id, *ids, tokenizer.end_id]
    assert tokenizer.decode(around) == text == tokenizer.decode(jnp.array(around))
    assert max(around) < tokenizer.vocab_size == 256


def test_bytes_that_are_no_text_are_replaced():
    assert ByteTokenizer().decode([72, 0xE6, 0x9D, 105]) == "H\N{REPLACEMENT CHARACTER}i"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE as `transformers` saves it, that begins every text with a token."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=283,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    path = tmp_path_factory.mktemp("tokenizer")
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>"
    )
    saved.save_pretrained(path)
    return path


def test_equals_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    assert isinstance(ours, Tokenizer)
    assert ours.begin_id == theirs.bos_token_id and ours.end_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    for text in (*TEXTS, "lowest</s>newest"):
        ids = ours.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ours.encode(TEXTS[3])) == TEXTS[3]
    # It goes to the processes that read ahead.
    assert pickle.loads(pickle.dumps(ours)).encode(TEXTS[0]).tolist() == (
        ours.encode(TEXTS[0]).tolist()
    )


def test_a_file_alone_does_not_name_its_special_tokens(folder):
    alone = load_tokenizer(folder / "tokenizer.json")
    assert alone.begin_id is None and alone.end_id is None
    assert alone.encode("low").tolist() == load_tokenizer(folder).encode("low").tolist()


def test_vocabulary_reaches_to_the_largest_id():
    gaps = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 40}, unk_token="a"))
    assert FileTokenizer(gaps).vocab_size == 41


def test_token_of_an_older_configuration(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.begin_id is None and loaded.end_id == load_tokenizer(folder).end_id
    config.write_text(json.dumps({"eos_token": "<|end|>"}))
    with pytest.raises(ValueError, match=r"eos_token '<\|end\|>' .* is not in tokenizer.json"):
        load_tokenizer(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"load_tokenizer: .*config.json' is not JSON"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"load_tokenizer: no file '.*missing'; pass"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no file '.*tokenizer.json', only vocab.json; pass"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"vocab.json' is not a tokenizer of the tokenizers lib"):
        load_tokenizer(tmp_path / "vocab.json")


def test_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizers is not installed; pip install tokenizers"):
        load_tokenizer(folder)


@pytest.mark.parametrize("wrong", [-1, 256])
def test_foreign_ids_are_named(wrong, folder):
    with pytest.raises(ValueError, match=f"ByteTokenizer.decode: id {wrong} is outside .* 256"):
        ByteTokenizer().decode([104, wrong])
    size = load_tokenizer(folder).vocab_size
    with pytest.raises(ValueError, match=f"FileTokenizer.decode: id {size} is outside .* {size}"):
        load_tokenizer(folder).decode(np.array([size]))
