"""A file's kind is its suffix, or its content where that does not say; text is UTF-8 or refused."""

import bz2
import gzip
import json
import lzma
import random

import pytest

from k2jax.config import ConfigError
from k2jax.data.sources import find
from k2jax.data.tally import Tally

DOCS = [f"document {i} \u00e9" for i in range(30)]
LINES = "".join(json.dumps({"text": doc}) + "\n" for doc in DOCS).encode()
CSV = ("id,text\r\n" + "".join(f'{i},"{doc}"\r\n' for i, doc in enumerate(DOCS))).encode()
MARK = b"\xef\xbb\xbf"


def texts(file, content: bytes, field="text"):
    file.write_bytes(content)
    return [d.text for d in find(str(file), field).documents()]


def error_of(file, content: bytes, field="text") -> str:
    with pytest.raises(ConfigError) as error:
        texts(file, content, field)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"text": doc} for doc in DOCS], indent=1).encode()),
        ("a.json", LINES),
        ("a.ndjson", LINES),
        ("a.csv", CSV),
        ("a.tsv", CSV.replace(b",", b"\t")),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.csv.gz", gzip.compress(CSV)),
        ("a.json.xz", lzma.compress(LINES)),
        ("a", LINES),
        ("a.dump", gzip.compress(LINES)),
        ("a.xz", lzma.compress(LINES)),
        ("a.jsonl", MARK + LINES),
        ("a.json", MARK + LINES),
        ("a.csv", MARK + CSV),
        ("a.jsonl.gz", gzip.compress(MARK + LINES)),
    ],
)
def test_records_are_found_in_every_kind(tmp_path, name, content):
    assert texts(tmp_path / name, content) == DOCS


def test_lines_packed_20_times_over_are_20_times_as_many_documents(tmp_path):
    """A packed file may hold the same lines again: none of them is dropped."""
    assert texts(tmp_path / "a.jsonl.bz2", bz2.compress(LINES * 20)) == DOCS * 20


def test_one_object_is_one_record(tmp_path):
    pretty = json.dumps({"text": "a", "id": [1, 2]}, indent=1).encode()
    assert texts(tmp_path / "a.json", pretty) == texts(tmp_path / "b.json", b'{"text": "a"}')


@pytest.mark.parametrize("name", ["a.txt", "a", "a.log"])
def test_a_text_loses_its_byte_order_mark_and_nothing_else(tmp_path, name):
    assert texts(tmp_path / name, MARK + "\ufeffone\r\n".encode()) == ["\ufeffone\r\n"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.bin", random.Random(0).randbytes(20_000), "is no UTF-8 text"),
        ("a.txt", random.Random(0).randbytes(20_000), "is no UTF-8 text"),
        ("a.txt", ("The naïve café costs £5.\n" * 90).encode("latin-1"), "byte 6 is 0xef"),
        ("a.jsonl", ('{"text": "café naïve"}\n' * 90).encode("latin-1"), "is no UTF-8 text"),
        ("a.txt", "text £".encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16"),
        ("a.csv", CSV.decode().encode("utf-32"), "is UTF-32"),
        ("a.txt", ("text " * 50).encode("utf-16-le"), "byte 1 is NUL"),
        ("a.txt", gzip.compress(LINES), "but a .gz file by its first bytes"),
        ("a.jsonl", b"PAR1" + LINES, "but a .parquet file"),
        ("a.zip", b"PK\x03\x04 and so on", "but a .zip file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        ("a.csv", b"id,body\n1,x\n", 'no column "text" in its first line, which has: id, body'),
        ("a.csv", b"id,text\n1,x,y\n", "line 2 has 3 cells, the first line 2"),
        ("a.csv", b'id,text\n1,"x\n', "is no CSV file"),
        ("a.json", b'[{"text": "a"}', "is not JSON"),
        ("a.json", b'{"a": 1}', 'has no field "text"'),
        ("a.jsonl.xz", lzma.compress(LINES)[:-20], "damaged"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-20], "damaged"),
        ("a.bz2", b"BZh no stream", "damaged"),
    ],
)
def test_what_is_no_text_or_damaged_gets_one_line(tmp_path, name, content, line):
    assert line in error_of(tmp_path / name, content)


def test_an_unknown_kind_is_refused_with_the_kinds_that_are_read(tmp_path):
    message = error_of(tmp_path / "a.bin", random.Random(0).randbytes(20_000))
    assert "read are .txt" in message and ".jsonl" in message and ".xz" in message


def test_single_wrong_bytes_are_replaced_and_counted(tmp_path):
    """One in a million may be replaced; every third one says that it is another encoding."""
    file = tmp_path / "a.jsonl"
    lines = LINES * 100
    file.write_bytes(lines.replace(b"document 7", b"document \xff\xe2\x82", 1))
    tally = Tally()
    documents = [d.text for d in find(str(file)).documents(tally)]
    assert documents[7] == "document \ufffd\ufffd \u00e9" and len(documents) == 3_000
    assert (tally.replaced, tally.replaced_at) == (2, f"{file} line 8")
    assert "2 characters that are no UTF-8 replaced by U+FFFD, the first in" in tally.describe()[0]
    text = tmp_path / "b.txt"
    text.write_bytes(b"x" * 500 + b"\xe2\x82" + "\ufffd".encode() + b"y" * 500)
    tally = Tally()
    (document,) = find(str(text)).documents(tally)
    assert document.text == "x" * 500 + "\ufffd\ufffd" + "y" * 500 and tally.replaced == 1


def test_half_surrogate_pairs_in_json_are_replaced_and_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\\\\ud83d"}\n')
    tally = Tally()
    documents = [d.text for d in find(str(file)).documents(tally)]
    assert documents == ["\ufffd", "\U0001f600", "\\ud83d"] and tally.replaced == 1


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ('{"text": 7}', '"text" is a number, not a text'),
        ('{"text": ["a"]}', '"text" is a list, not a text'),
        ('{"text": {"a": 1}}', '"text" is an object, not a text'),
        ('{"text": true}', '"text" is a boolean, not a text'),
        ('{"messages": "[]"}', '"messages" is a text; it must be a list of objects'),
        ('{"messages": {}}', '"messages" is an object'),
        ("[1]", 'has no field "text" or "messages"; it is a list'),
        ("7", 'has no field "text" or "messages"; it is a number'),
        ("{}", "it has: nothing"),
    ],
)
def test_a_record_of_the_wrong_type_is_named_as_what_it_is(tmp_path, record, line):
    message = error_of(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{record}\n'.encode())
    assert "line 2" in message and line in message


def test_null_is_no_text_and_is_counted(tmp_path):
    file, tally = tmp_path / "a.jsonl", Tally()
    file.write_text('{"text": null}\n{"text": "a"}\n{"messages": null}\n{"messages": []}\n')
    assert [d.name for d in find(str(file)).documents(tally)] == ["a.jsonl:1"]
    assert tally.describe() == ["3 records or files without text"]


def test_a_field_beside_conversations_is_a_setting_without_effect(tmp_path):
    talk = {"messages": [{"role": "user", "content": "hi"}], "prompt": "p"}
    message = error_of(tmp_path / "a.jsonl", json.dumps(talk).encode(), "prompt")
    assert 'has "messages", beside which --field prompt has no effect' in message
    other = json.dumps({"messages": None, "prompt": "p"}).encode()
    assert texts(tmp_path / "a.jsonl", other, "prompt") == ["p"]


def test_a_long_window_is_refused_as_what_it_is(tmp_path, monkeypatch):
    """`zstd --long=28`: the frame asks for 2^28 bytes, which no decoder gives unasked."""
    frame = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, (28 - 10) << 3, 0x01, 0x00, 0x00])
    pytest.importorskip("pyarrow")
    assert "zstd -d --long=31" in error_of(tmp_path / "a.jsonl.zst", frame)
