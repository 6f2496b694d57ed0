import gzip
import json

import pytest

from k2jax.config import ConfigError
from k2jax.data import readers
from k2jax.data.readers import WHOLE, Share
from k2jax.data.sources import Source, find
from k2jax.data.values import Chat

LINES = [{"text": f"text {i} \u4e8c" * (i % 7)} for i in range(300)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def jsonl() -> bytes:
    return "".join(json.dumps(line) + "\n" for line in LINES).encode()


def pack(name: str, content: bytes, folder):
    file = folder / name
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(content))
    elif name.endswith(".zst"):
        arrow = pytest.importorskip("pyarrow")
        with arrow.CompressedOutputStream(str(file), "zstd") as out:
            out.write(content)
    else:
        file.write_bytes(content)
    return file


def table_of(name: str, folder):
    arrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    parquet = pytest.importorskip("pyarrow.parquet")
    table, file = arrow.table({"text": [line["text"] for line in LINES]}), folder / name
    if name.endswith(".parquet"):
        parquet.write_table(table, file, row_group_size=70)
        return file
    opened = ipc.new_stream if name.startswith("stream") else ipc.new_file
    with opened(str(file), table.schema) as out:
        out.write_table(table, max_chunksize=70)
    return file


def array_record_of(name: str, folder):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(folder / name), "group_size:1")
    for line in LINES:
        writer.write(line["text"].encode())
    writer.close()
    return folder / name


@pytest.mark.parametrize(
    "name",
    [
        "d.jsonl",
        "d.jsonl.gz",
        "d.jsonl.zst",
        "d.json.gz",
        "d.parquet",
        "stream.arrow",
        "file.arrow",
        "d.arrayrecord",
    ],
)
@pytest.mark.parametrize("of", [1, 3, 7])
def test_shares_of_a_file_are_its_records_once_with_their_places(tmp_path, monkeypatch, name, of):
    monkeypatch.setattr(readers, "STRETCH", 4)
    if name.endswith(("parquet", "arrow")):
        file = table_of(name, tmp_path)
    elif name.endswith("arrayrecord"):
        file = array_record_of(name, tmp_path)
    else:
        file = pack(name, jsonl(), tmp_path)
    got = [dict(readers.read(file, share=Share(i, of))) for i in range(of)]
    assert sum(map(len, got)) == len(LINES)
    together = {place: text for part in got for place, text in part.items()}
    assert together == {i: line["text"] for i, line in enumerate(LINES)}
    assert of == 1 or sum(map(bool, got)) > 1


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz", "book.zst"])
def test_shares_of_a_lone_text_are_its_blocks_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "BLOCK", 100)
    monkeypatch.setattr(readers, "STRETCH", 2)
    text = "".join(f"line {i} \u00e9\r\n" for i in range(500))
    file = pack(name, text.encode(), tmp_path)
    assert "".join(dict(readers.read_blocks(file)).values()) == text
    parts = [dict(readers.read_blocks(file, Share(i, 3))) for i in range(3)]
    together = {place: block for part in parts for place, block in part.items()}
    assert "".join(together[i] for i in range(len(together))) == text
    assert sum(map(len, parts)) == len(together) > 50


@pytest.mark.parametrize("tail", [b"", b"\n", b"\n\n", b"\r\n", b'\n{"text": "last"}'])
def test_lines_belong_to_the_share_in_which_they_begin(tmp_path, tail):
    file = pack("d.jsonl", b'{"text": "a"}\n\n{"text": "bb"}' + tail, tmp_path)
    whole = dict(readers.read(file))
    for of in range(1, 12):
        got = [item for i in range(of) for item in readers.read(file, share=Share(i, of))]
        assert got == list(whole.items())


def test_a_folder_of_the_datasets_package_is_read(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    table_of("stream-00000-of-00001.arrow", folder)
    table_of("stream-cache.arrow", folder).rename(folder / "cache-0123.arrow")
    (folder / "dataset_info.json").write_text("{}")
    assert [d.text for d in find(str(folder)).documents()] == [
        x["text"] for x in LINES if x["text"]
    ]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ConfigError, match="holds the splits train; name one of them"):
        find(str(tmp_path))


def test_conversations_are_read_from_lines_and_from_parquet(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    records = [{"messages": CHAT, "tools": tools}, {"messages": CHAT, "text": "no"}]
    file = pack("d.jsonl", "\n".join(map(json.dumps, records)).encode(), tmp_path)
    assert [v for _, v in readers.read(file)] == [Chat(CHAT, tools), Chat(CHAT, [])]
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"messages": [CHAT, None]}), tmp_path / "d.parquet")
    got = [v for _, v in readers.read(tmp_path / "d.parquet")]
    assert got == [Chat(CHAT, []), ""]


def test_another_field_may_have_the_text(tmp_path):
    file = pack("d.jsonl", b'{"content": "one", "text": "two"}\n', tmp_path)
    assert [d.text for d in find(str(file), "content").documents()] == ["one"]


def error_of(file, share=WHOLE) -> str:
    source = Source("d", file, (file,))
    with pytest.raises(ConfigError) as error:
        list(source.records(file, share))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst", "book.txt.gz"])
def test_a_compressed_file_cut_short_is_named(tmp_path, name):
    file = pack(name, jsonl() * 20, tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    assert str(file) in error_of(file) and "damaged" in error_of(file)
    file.write_bytes(b"not compressed at all")
    assert str(file) in error_of(file) and "damaged" in error_of(file)


@pytest.mark.parametrize("of", [1, 2, 5])
def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path, of):
    lines = jsonl().splitlines()
    lines[211] = b'{"text": '
    file = pack("d.jsonl", b"\n".join(lines), tmp_path)
    at = sum(len(line) + 1 for line in lines[:211]) * of // file.stat().st_size
    assert f"{file} line 212 is not JSON" in error_of(file, Share(at, of))
