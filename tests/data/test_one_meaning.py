"""One record, one meaning: the same records give the same documents from every kind of file."""

import csv
import gzip
import json

import numpy as np
import pytest

from k2jax.data.readers import Share, read
from k2jax.data.values import Chat
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.supervised import encode_supervised

hypothesis = pytest.importorskip("hypothesis")
arrow = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")
array_record = pytest.importorskip("array_record.python.array_record_module")
st = hypothesis.strategies

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
# Half surrogate pairs have no place in Arrow's texts.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORD = st.sampled_from(["add", "get-weather", "ns:tool"])


def objects(always, **optional):
    """JSON objects with members in Arrow's order, which is the schema's; some may be absent."""
    order = [*always, *optional]
    drawn = st.fixed_dictionaries(always, optional=optional)
    return drawn.map(lambda members: {key: members[key] for key in order if key in members})


ARGUMENTS = objects({}, a=TEXT, b=st.integers(-9, 9))
TYPED = objects({"type": st.just("string")}, description=TEXT)
PARAMETERS = objects(
    {"type": st.just("object"), "properties": objects({}, a=TYPED, b=TYPED)},
    required=st.lists(TEXT, max_size=2),
)
FUNCTION = objects({"name": WORD}, description=TEXT, parameters=PARAMETERS)
TOOL = objects({"type": st.just("function"), "function": FUNCTION})

_TYPED = arrow.struct({"type": arrow.string(), "description": arrow.string()})
_PARAMETERS = arrow.struct(
    {
        "type": arrow.string(),
        "properties": arrow.struct({"a": _TYPED, "b": _TYPED}),
        "required": arrow.list_(arrow.string()),
    }
)
_FUNCTION = arrow.struct(
    {"name": arrow.string(), "description": arrow.string(), "parameters": _PARAMETERS}
)
_CALL = arrow.struct(
    {
        "id": arrow.string(),
        "type": arrow.string(),
        "function": arrow.struct(
            {
                "name": arrow.string(),
                "arguments": arrow.struct({"a": arrow.string(), "b": arrow.int64()}),
            }
        ),
    }
)
_MESSAGE = arrow.struct(
    {
        "role": arrow.string(),
        "content": arrow.string(),
        "name": arrow.string(),
        "weight": arrow.int64(),
        "tool_calls": arrow.list_(_CALL),
        "tool_call_id": arrow.string(),
    }
)
SCHEMA = arrow.schema(
    {
        "text": arrow.string(),
        "messages": arrow.list_(_MESSAGE),
        "tools": arrow.list_(arrow.struct({"type": arrow.string(), "function": _FUNCTION})),
        "id": arrow.int64(),
    }
)


@st.composite
def conversations(draw):
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if draw(st.booleans()):
            messages[-1]["name"] = draw(TEXT)
        names = draw(st.lists(WORD, max_size=2))
        calls = [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": name, "arguments": draw(ARGUMENTS)},
            }
            for i, name in enumerate(names)
        ]
        messages.append({"role": "assistant", "content": draw(TEXT)})
        if calls:
            messages[-1]["tool_calls"] = calls
        if draw(st.booleans()):
            messages[-1]["weight"] = draw(st.integers(0, 1))
        for call in reversed(calls):
            result = {"role": "tool", "tool_call_id": call["id"], "content": draw(TEXT)}
            messages.append(result)
    return messages


RECORD = st.one_of(
    objects({"text": st.none() | TEXT}, id=st.integers(0, 9)),
    objects({"messages": conversations()}, tools=st.lists(TOOL, max_size=2), text=TEXT),
)


def write_all(folder, records):
    """The same records in every kind of file that can hold them."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.ndjson").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "array.json").write_text(json.dumps(records, indent=1))
    (folder / "lines.json").write_bytes(lines)
    table = arrow.Table.from_pylist(records, SCHEMA)
    parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    for name, opened in (("stream.arrow", ipc.new_stream), ("file.feather", ipc.new_file)):
        with opened(str(folder / name), table.schema) as out:
            out.write_table(table, max_chunksize=2)
    writer = array_record.ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
    for line in lines.splitlines():
        writer.write(line)
    writer.close()
    return sorted(folder.iterdir())


def learn(value):
    """The document of a record, or the learned tokens of a conversation."""
    if not isinstance(value, Chat):
        return value
    ids, learned = encode_supervised(BYTES, value.messages, value.tools)
    return ids, np.flatnonzero(learned).tolist()


@hypothesis.settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.lists(RECORD, min_size=1, max_size=6))
def test_every_kind_of_file_gives_the_same_documents(tmp_path_factory, records):
    files = write_all(tmp_path_factory.mktemp("kinds"), records)
    documents = {f.name: {i: learn(value) for i, value in read(f)} for f in files}
    first = documents["a.jsonl"]
    for name, other in documents.items():
        assert other == first, name
    assert len(first) == len(records)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=20)
@hypothesis.given(st.lists(st.none() | TEXT, min_size=1, max_size=6))
def test_a_column_of_texts_is_the_same_in_tables_and_cells(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("cells")
    parquet.write_table(arrow.table({"text": texts}), folder / "a.parquet")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, quoting=csv.QUOTE_ALL)
        out.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    assert dict(read(folder / "a.csv")) == dict(read(folder / "a.parquet"))


@pytest.mark.parametrize("of", [2, 3])
def test_shares_of_every_kind_are_its_records_once(tmp_path, monkeypatch, of):
    monkeypatch.setattr("k2jax.data.readers.STRETCH", 2)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records = [{"text": f"text {i}"} if i % 2 else {"messages": talk} for i in range(30)]
    for file in write_all(tmp_path, records):
        whole = list(read(file))
        parts = [item for i in range(of) for item in read(file, share=Share(i, of))]
        assert sorted(parts, key=lambda item: item[0]) == whole, file


@pytest.mark.parametrize(
    ("cells", "noun"),
    [
        ([["one", "two"]], "a list"),
        ([{"a": "x"}], "an object"),
        ([7], "a number"),
        ([1.5], "a number"),
        ([True], "a boolean"),
    ],
)
def test_a_column_that_is_no_text_is_refused_as_in_json_lines(tmp_path, cells, noun):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": cells[0]}) + "\n")
    table = arrow.table({"text": cells})
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f'"text" is {noun}, not a text'):
            list(read(file))


def test_what_json_cannot_say_is_refused_in_a_conversation(tmp_path):
    message = {"role": "user", "content": b"bytes"}
    parquet.write_table(arrow.table({"messages": [[message]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="record 0 has bytes in a conversation"):
        list(read(tmp_path / "a.parquet"))


def test_a_map_of_arguments_is_an_object(tmp_path):
    kind = arrow.list_(
        arrow.struct({"role": arrow.string(), "extra": arrow.map_(arrow.string(), arrow.string())})
    )
    column = arrow.array([[{"role": "user", "extra": [("a", "b")]}]], kind)
    parquet.write_table(arrow.table({"messages": column}), tmp_path / "a.parquet")
    ((_, chat),) = read(tmp_path / "a.parquet")
    assert chat == Chat([{"role": "user", "extra": {"a": "b"}}], [])
