import json
import sys
import sysconfig
from pathlib import Path

import pytest

from k2jax.config import ConfigError
from k2jax.data import readers
from k2jax.data.sources import find, held_out, module_name, split


def read(path) -> dict[str, str]:
    return {d.name: d.text for d in find(str(path)).documents()}


def test_default_is_the_standard_library_without_tests():
    source = find("")
    names = [source.name(file) for file in source.files]
    assert {"os", "asyncio", "asyncio.tasks", "json.decoder"} <= set(names)
    words = {word for name in names for word in name.split(".")}
    assert not words & {"test", "tests", "idle_test", "site-packages", "_sysconfigdata"}
    total = sum(file.stat().st_size for file in source.files)
    kept = sum(f.stat().st_size for f, n in zip(source.files, names, strict=True) if held_out(n))
    assert total > 8e6
    assert 300e3 < kept < 450e3 and 0.03 < kept / total < 0.04
    assert source.files == find("stdlib").files


def test_a_module_is_held_out_by_its_name_alone():
    """The rule is part of every published number: these stay held out."""
    assert all(map(held_out, ["os", "heapq", "pathlib", "ipaddress"]))
    assert not any(map(held_out, ["json", "asyncio", "argparse", "typing"]))
    assert module_name(Path("asyncio/__init__.py")) == "asyncio"
    assert module_name(Path("asyncio/tasks.py")) == "asyncio.tasks"
    assert module_name(Path("__init__.py")) == "__init__"


def test_folder_gives_its_text_files_in_order_byte_for_byte(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_bytes(b"# title\r\n")
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode() + b"\xff")
    (tmp_path / "c.py").write_text("pass\n")
    (tmp_path / "c.png").write_bytes(b"\x89")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "d.txt").write_text("no")
    got = read(tmp_path)
    assert got == {"a.txt": "caf\u00e9\ufffd", "c.py": "pass\n", "b/x.md": "# title\r\n"}
    assert list(got) == ["a.txt", "c.py", "b/x.md"]


def test_one_text_file_becomes_documents_cut_at_line_ends(tmp_path):
    file = tmp_path / "book"
    text = "".join(f"line {i} \u00e9\r\n" for i in range(5_000)) + "x" * 50_000
    file.write_bytes(text.encode())
    got = read(file)
    assert "".join(got.values()) == text
    assert list(got)[:2] == ["book:0", "book:1"]
    assert all(part.endswith("\r\n") for part in list(got.values())[:3])
    assert max(map(len, got.values())) <= 2 * readers.BLOCK


def test_jsonl_gives_the_field_text(tmp_path):
    file = tmp_path / "d.jsonl"
    records = [{"text": "one\n"}, {"text": "\u4e8c", "id": 7}, {"text": ""}, {"text": "four"}]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read(file) == {"d.jsonl:0": "one\n", "d.jsonl:1": "\u4e8c", "d.jsonl:3": "four"}


def test_parquet_gives_the_column_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "\u4e09"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert read(tmp_path) == {"d.parquet:0": "one", "d.parquet:2": "\u4e09"}


def test_arrayrecord_gives_its_records(tmp_path, monkeypatch):
    module = pytest.importorskip("array_record.python.array_record_module")
    monkeypatch.setattr(readers, "RECORDS", 2)
    writer = module.ArrayRecordWriter(str(tmp_path / "d.arrayrecord"), "group_size:1")
    for text in ("one", "\u4e8c", "three"):
        writer.write(text.encode())
    writer.close()
    assert list(read(tmp_path).values()) == ["one", "\u4e8c", "three"]


def test_fingerprint_changes_with_files_and_with_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    first = find(str(tmp_path)).fingerprint()
    assert find(str(tmp_path)).fingerprint() == first
    (tmp_path / "b.txt").write_text("b")
    second = find(str(tmp_path)).fingerprint()
    (tmp_path / "b.txt").write_text("bb")
    assert len({first, second, find(str(tmp_path)).fingerprint()}) == 3


def test_split_holds_out_one_name_in_25_and_at_least_one_document(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(1_000)))
    got = split(find(str(file)))
    assert 25 < len(got.heldout) < 60 and all(map(held_out, got.heldout))
    file.write_text('{"text": "abc"}\n{"text": "abc"}\n')
    got = split(find(str(file)))
    assert len(got.heldout) == 1 and got.train_characters == 3


def test_adding_documents_moves_none_to_the_other_side(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text("x")
    before = set(split(find(str(tmp_path))).heldout)
    (tmp_path / "010.txt").write_text("x")
    assert set(split(find(str(tmp_path))).heldout) - {"010.txt"} == before


def error_of(path) -> str:
    with pytest.raises(ConfigError) as error:
        split(find(str(path)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_empty_data_are_named(tmp_path):
    (tmp_path / "corpus.txt").write_text("one document only")
    assert "did you mean 'corpus.txt'?" in error_of(tmp_path / "corpsu.txt")
    assert error_of(tmp_path / "no" / "where") == f"no data at {tmp_path}/no/where"
    assert "only local files are read" in error_of("owner/dataset")
    assert "has 1 document(s) with text" in error_of(tmp_path / "corpus.txt")
    (tmp_path / "corpus.txt").write_text("")
    assert error_of(tmp_path / "corpus.txt") == f"data at {tmp_path}/corpus.txt is empty"
    assert error_of(tmp_path) == f"data at {tmp_path} is empty"
    (tmp_path / "corpus.txt").unlink()
    assert "has no data files; it may hold .txt" in error_of(tmp_path)
    (tmp_path / "program.js").write_text("x")
    assert "1 not read: 1 .js (program.js)" in error_of(tmp_path)


def test_records_without_text_are_named(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a"}\n{"content": "b", "id": 1}\n')
    assert error_of(file) == f'{file} line 2 has no field "text" or "messages"; it has: content, id'
    file.write_text('{"text": "a"}\n["text"]\n')
    assert "line 2 has no field" in error_of(file)
    file.write_text('{"text": "a"}\n{"text": \n')
    assert "line 2 is not JSON" in error_of(file)


def test_shards_of_another_kind_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("array_record")
    for name in ("d.parquet", "d.arrayrecord"):
        (tmp_path / name).write_text("no such format")
        assert f"{name} is no " in error_of(tmp_path / name)
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "e.parquet")
    assert 'has no column "text" or "messages"; it has: body' in error_of(tmp_path / "e.parquet")


def test_a_missing_package_names_the_extra_to_install(tmp_path, monkeypatch):
    for name, package, extra in (
        ("d.parquet", "pyarrow.parquet", "parquet"),
        ("d.arrayrecord", "array_record.python.array_record_module", "arrayrecord"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_text("x")
        assert f"pip install 'k2jax[{extra}]'" in error_of(tmp_path / name)


def test_a_python_without_library_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "give a path as data" in error_of("")
