"""A folder's files are read, or counted by the reason why not."""

import json
import os

from k2jax.data.sources import find
from k2jax.data.tokenise import tokenise


def write(folder, *names, text="some text"):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_the_rules_of_the_standard_library_are_its_own(tmp_path):
    """Dataset repositories call a split `test`; half of a code corpus is `tests`."""
    names = [
        "test/a.txt",
        "tests/b.txt",
        "idle_test/c.txt",
        "site-packages/d.txt",
        "__pycache__/e.txt",
        "config-guide.txt",
        "_sysconfigdata.txt",
    ]
    write(tmp_path, *names)
    source = find(str(tmp_path))
    assert sorted(map(source.name, source.files)) == sorted(names)
    assert not source.describe_left_out()


def test_links_are_followed_once_around(tmp_path):
    write(tmp_path, "corpus/a.txt", "elsewhere/b.txt", "elsewhere/c/d.txt")
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "c" / "up").symlink_to("../../corpus")
    (corpus / "file.txt").symlink_to("../elsewhere/b.txt")
    (corpus / "broken.txt").symlink_to("nowhere")
    source = find(str(corpus))
    assert list(map(source.name, source.files)) == [
        "a.txt",
        "file.txt",
        "linked/b.txt",
        "linked/c/d.txt",
    ]
    assert source.describe_left_out() == (
        f"{corpus}: 2 not read: 1 a broken link (broken.txt), 1 a link to a folder above it"
        " (linked/c/up)"
    )


def test_what_is_not_read_is_counted_by_reason_in_one_line(tmp_path, capsys):
    write(tmp_path, "a.txt", "b.txt", "x.js", "y/z.js", "LICENSE", ".git/c.txt", ".d.txt")
    write(tmp_path, "dataset_info.json", text='{"features": {}}')
    write(tmp_path, "table.csv", text="id,context\n1,x\n")
    write(tmp_path, "tokens/tokens.json")
    os.mkfifo(tmp_path / "pipe.txt")
    source = find(str(tmp_path))
    assert list(map(source.name, source.files)) == ["a.txt", "b.txt"]
    line = source.describe_left_out()
    assert "9 not read: 2 hidden (.git), 2 .js (x.js)" in line and "\n" not in line
    for part in (
        "1 without a suffix (LICENSE)",
        "1 .json without records (dataset_info.json)",
        "1 .csv without records (table.csv)",
        "1 a folder of tokens (tokens)",
        "1 no regular file (pipe.txt)",
    ):
        assert part in line


def test_json_and_csv_of_a_folder_are_read_where_they_have_records(tmp_path):
    write(tmp_path, "a.json", text='[{"text": "one"}]')
    write(tmp_path, "b.csv", text="id,text\n1,two\n")
    write(tmp_path, "c.json", text='{"messages": [], "text": "three"}')
    write(tmp_path, "d.jsonl", text='{"text": "four"}\n')
    assert [d.text for d in find(str(tmp_path)).documents()] == ["one", "two", "three", "four"]


def test_names_that_are_no_text_are_taken(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    (tmp_path / "b.txt").write_text("y")
    manifest = tokenise(str(tmp_path), tmp_path / "out", vocab=512, workers=1)
    assert manifest.train.documents + manifest.heldout.documents == 2
    assert json.loads((tmp_path / "out" / "tokens.json").read_text())
