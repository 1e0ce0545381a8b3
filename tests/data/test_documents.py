"""Documents from files: which they are, in which part, and what cannot be read."""

import inspect
import json
import sys
import types
import warnings

import grain
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxmodels.data import ByteTokenizer, TokenDocuments, read_documents, tokenize


@pytest.fixture
def folder(tmp_path):
    """Files of each kind; hidden ones, empty ones and one with a byte order mark among them."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_bytes("zwölf\r\n".encode())
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfone = 1\n")
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git" / "config").write_text("no")
    rows = [{"text": "first", "id": 1}, {"text": ""}, {"text": "second\n"}]
    (tmp_path / "c.JSONL").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


WHOLE = ["one = 1\n", "zwölf\r\n", "first", "second\n"]


def test_folder_is_read_by_name_with_every_kind_of_file(folder):
    assert list(read_documents(folder)) == WHOLE
    assert list(read_documents(str(folder / "a.py"))) == WHOLE[:1]
    assert list(read_documents([folder / "c.JSONL", folder / "b"])) == WHOLE[2:] + WHOLE[1:2]


def test_field_is_chosen(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "no", "code": "yes"}')
    assert list(read_documents(tmp_path, field="code")) == ["yes"]


def test_parts_are_disjoint_complete_and_stay(tmp_path):
    def write(root, numbers):
        root.mkdir()
        for number in numbers:
            (root / f"{number}.txt").write_text(f"file {number}")
        (root / "rows.jsonl").write_text(
            "\n".join(json.dumps({"text": f"row {n}"}) for n in range(200))
        )

    write(tmp_path / "few", range(200))
    write(tmp_path / "more", range(230))
    parts = {
        name: [{*read_documents(tmp_path / name, split=part)} for part in ("train", "test")]
        for name in ("few", "more")
    }
    for train, test in parts.values():
        assert not train & test
    (train, test), (more_train, more_test) = parts.values()
    assert len(train | test) == 400 and train < more_train and test <= more_test
    # Binomial(200, 1/8) has deviation 4.7.
    for kind in ("file", "row"):
        assert 25 - 3 * 4.7 < sum(text.startswith(kind) for text in test) < 25 + 3 * 4.7


def test_unreadable_documents_are_skipped_counted_and_named(folder):
    (folder / "a.bin").write_bytes(b"ab\xffc")
    lines = [b'{"text": "good"}', b"{", b"[1]", b'{"title": 1}', b'{"text": 2}', b'"\xc3']
    (folder / "d.jsonl").write_bytes(b"\n".join(lines))
    message = (
        r"skipped 6 of 13 documents: a.bin \(not UTF-8: byte 2 is 0xff\); "
        r"d.jsonl:2 \(not JSON: .*\); d.jsonl:3 \(a JSON list, .*\); "
        r"d.jsonl:4 \(no field 'text' among 'title'\); "
        r"d.jsonl:5 \(field 'text' is a int, not a string\); \.\.\."
    )
    with pytest.warns(UserWarning, match=f"read_documents: {message}$"):
        assert list(read_documents(folder)) == [*WHOLE, "good"]


def test_strict_reading_stops_at_the_first(folder):
    (folder / "a.bin").write_bytes(b"\xc3")
    with pytest.raises(ValueError, match=r"read_documents: a.bin \(not UTF-8: byte 0 is 0xc3\)"):
        list(read_documents(folder, strict=True))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_file_that_disappears_while_reading_is_named(tmp_path, ending, strict):
    """After the first document; skipping it would train on less than was asked for."""
    (tmp_path / "a.txt").write_text("first")
    gone = tmp_path / f"b.{ending}"
    gone.write_text("never read")
    stream = read_documents(tmp_path, strict=strict)
    assert next(stream) == "first"
    gone.unlink()
    with pytest.raises(OSError, match=rf"read_documents: .*b\.{ending}' cannot .*No such file"):
        next(stream)


def test_a_disk_that_fails_while_reading_is_named(tmp_path, monkeypatch):
    """The system's own message says no name."""
    (tmp_path / "a.txt").write_text("first")

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(tmp_path), "read_bytes", fail)
    with pytest.raises(OSError, match=r"a\.txt' cannot be read any more \(Input/output error\)"):
        list(read_documents(tmp_path))


def test_a_file_cut_while_reading_loses_its_last_document_only(tmp_path):
    lines = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(4000))
    file = tmp_path / "a.jsonl"
    file.write_text(lines)
    stream = read_documents(file)
    assert next(stream) == "document 0"
    file.write_text(lines[:-9])
    with pytest.warns(UserWarning, match=r"skipped 1 of 4000 documents: a\.jsonl:4000 \(not JSON"):
        assert len(list(stream)) == 3998
    stream = read_documents(file, strict=True)
    with pytest.raises(ValueError, match=r"a\.jsonl:4000 \(not JSON.* repair or remove it"):
        list(stream)


def test_a_fault_counts_in_its_own_part_alone(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}").write_text("good")
    counted = []
    for broken in range(40):
        (tmp_path / f"{broken}").write_bytes(b"\xff")
        for part in ("train", "test"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                list(read_documents(tmp_path, split=part))
            counted += [part] * len(caught)
        (tmp_path / f"{broken}").write_text("good")
    assert len(counted) == 40 and 0 < counted.count("test") < 20


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"read_documents: '.*none' does not exist; pass a file"):
        read_documents(tmp_path / "none")
    with pytest.raises(ValueError, match=r"read_documents: unknown split 'val'; pass 'train'"):
        inspect.unwrap(read_documents)(tmp_path, split="val")
    with pytest.raises(ValueError, match=r"read_documents: 0 file\(s\) holds no document; add"):
        list(read_documents(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"content": "a"}')
    with pytest.raises(ValueError, match=r"1 file.* can be read: x.jsonl:1 \(no field 'text'"):
        list(read_documents(tmp_path))
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "alone.txt").write_text("a")
    with pytest.raises(ValueError, match=r"the '(train|test)' part of 1 file.* split=None"):
        for part in ("train", "test"):
            list(read_documents(tmp_path, split=part))


def test_rows_of_parquet_files(tmp_path):
    rows = pyarrow.array([b"a", None, b"\xff", "ß".encode()], pyarrow.binary())
    table = pyarrow.table({"text": rows, "id": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    (tmp_path / "b.parquet").write_bytes(b"PAR2")
    message = (
        r"skipped 3 of 5 documents: a.parquet:2 \(null\); a.parquet:3 \(not UTF-8: byte 0 is 0xff"
        r"\); b.parquet:1 \("
    )
    with pytest.warns(UserWarning, match=message):
        assert list(read_documents(tmp_path)) == ["a", "ß"]
    with pytest.raises(ValueError, match=r"no column 'code' among \['text', 'id'\]"):
        list(read_documents(tmp_path / "a.parquet", field="code"))
    parquet.write_table(pyarrow.table({"code": ["x", "é"]}), tmp_path / "c.parquet")
    assert list(read_documents(tmp_path / "c.parquet", field="code")) == ["x", "é"]


def test_parquet_without_pyarrow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet' needs the package pyarrow, which is not"):
        list(read_documents(tmp_path))


def test_tokens_lie_end_to_end():
    documents = TokenDocuments.join([np.array([3, 1, 4]), np.array([], int), np.array([1, 5])])
    assert documents.tokens.dtype == np.int32 and len(documents) == 3
    assert documents.lengths.tolist() == [3, 0, 2]
    assert [documents[i].tolist() for i in range(3)] == [[3, 1, 4], [], [1, 5]]
    assert [row.tolist() for row in grain.MapDataset.source(documents)] == [[3, 1, 4], [], [1, 5]]
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"no document {index} of 3"):
            documents[index]
    assert len(TokenDocuments.join([])) == 0


def test_each_text_ends_in_one_end_token(monkeypatch):
    texts = ["ab", "", "ß"]
    bytes_and_ends = [[97, 98, 255], [255], [195, 159, 255]]
    assert [d.tolist() for d in tokenize(texts, ByteTokenizer())] == bytes_and_ends

    class Ends(ByteTokenizer):
        def encode(self, text):
            return np.append(super().encode(text), np.int32(self.end_id))

    assert [d.tolist() for d in tokenize(iter(texts), Ends())] == bytes_and_ends
    without = types.SimpleNamespace(
        vocab_size=256,
        begin_id=None,
        end_id=None,
        encode=ByteTokenizer().encode,
        decode=ByteTokenizer().decode,
    )
    assert [d.tolist() for d in tokenize(texts, without)] == [[97, 98], [], [195, 159]]
