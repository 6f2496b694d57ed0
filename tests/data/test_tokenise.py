import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from k2jax import cli
from k2jax.config import ConfigError
from k2jax.data import Batches, eval_batches, open_data, parts, pool, tokenise
from k2jax.data import token_folder as tokens
from k2jax.data.mixture import Mixture
from k2jax.data.rows import NAMES
from k2jax.data.sources import find, held_out
from k2jax.text.kimi_template import encode
from k2jax.text.kimi_tokenizer import Tokenizer

pytest.importorskip("array_record")

TEXTS = [f"document {i} says \u4e8c and {i * i}\n" * (1 + i % 5) for i in range(400)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", (4_000, 8_000))


@pytest.fixture
def tokenizer(byte_tokenizer, tmp_path):
    byte_tokenizer.save(tmp_path / "tok" / "tiktoken.model")
    return str(tmp_path / "tok")


@pytest.fixture
def source(tmp_path):
    """A folder of three kinds of files with TEXTS in order."""
    folder = tmp_path / "src"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:150]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(lines[150:398]))
    (folder / "c.txt").write_text(TEXTS[398])
    (folder / "d.md").write_text(TEXTS[399])
    return str(folder)


def texts_of(opened: tokens.Opened) -> list[str]:
    train = opened.train.store(opened.tokenizer.byte_lengths())
    return [*train.texts(opened.tokenizer), *opened.heldout.texts(opened.tokenizer)]


def test_every_document_is_there_once_on_its_side(source, tokenizer, tmp_path):
    manifest = tokenise.tokenise(source, tmp_path / "dst", tokenizer=tokenizer, workers=1)
    opened = tokens.open_tokens(str(tmp_path / "dst"))
    assert opened.manifest == manifest
    assert sorted(texts_of(opened)) == sorted(TEXTS)
    documents = list(find(source).documents())
    kept = {d.text for i, d in enumerate(documents) if i == 0 or held_out(d.name)}
    assert set(opened.heldout.texts(opened.tokenizer)) == kept
    total = manifest.train + manifest.heldout
    size = sum(len(text.encode()) for text in TEXTS)
    assert (total.documents, total.bytes) == (400, size)
    assert total.scored == size + 400 and total.tokens == size + 800  # [EOS]; [BOS] and [EOS]
    assert len(manifest.train.shards) > 3
    assert manifest.plan["files"] == [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in find(source).files
    ]


def test_several_processes_write_the_same_tokens_as_one(source, tokenizer, tmp_path):
    one = tokenise.tokenise(source, tmp_path / "one", tokenizer=tokenizer, workers=1)
    seen = []
    two = tokenise.tokenise(
        source, tmp_path / "two", tokenizer=tokenizer, workers=2, watch=lambda *x: seen.append(x)
    )
    assert one == two
    for name in (shard.file for shard in one.train.shards):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert seen[-1][0] == 400 and 0 < seen[-1][2] <= 1


# Parts as small as here, and killed in the middle of the third.
KILLED = """
import os, signal, sys
from k2jax.data import parts, pool, tokenise
parts.PART_BYTES = (4_000, 8_000)
def seen(documents, size, share):
    if len([n for n in os.listdir(sys.argv[2]) if n.startswith("train-")]) == 2 and documents % 7:
        os.kill(os.getpid(), signal.SIGKILL)
tokenise.tokenise(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], workers=1, watch=seen)
"""


def test_a_killed_run_is_not_opened_and_goes_on(source, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "dst"
    command = [sys.executable, "-c", KILLED, source, str(folder), tokenizer]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    for opens in (tokens.open_tokens, tokens.holds_tokens, lambda p: open_data(p, vocab=512)):
        with pytest.raises(ConfigError):
            opens(str(folder))
    assert list(folder.glob(".train-*")), "killed within a part"
    done = {file: file.stat().st_mtime_ns for file in folder.glob("train-*")}
    assert len(done) == 2
    again = tokenise.tokenise(source, folder, tokenizer=tokenizer, workers=1)
    assert {file: file.stat().st_mtime_ns for file in done} == done
    whole = tokenise.tokenise(source, tmp_path / "whole", tokenizer=tokenizer, workers=1)
    assert again == whole
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        f.name for f in (tmp_path / "whole").iterdir()
    )
    monkeypatch.setattr(pool, "run", None)
    assert tokenise.tokenise(source, folder, tokenizer=tokenizer) == whole, "nothing left to do"


def test_processes_end_with_the_one_that_started_them(tokenizer, tmp_path):
    file = tmp_path / "big.txt"
    file.write_text("some words of no meaning\n" * 200_000)
    command = [sys.executable, "-m", "k2jax.cli", "data", str(file), str(tmp_path / "dst")]
    main = subprocess.Popen([*command, "--tokenizer", tokenizer, "--workers", "2"])
    try:
        for _ in range(2400):
            if list((tmp_path / "dst").glob(".train-*")):
                break
            time.sleep(0.05)
        children = _children(main.pid)
        assert children
    finally:
        main.send_signal(signal.SIGKILL)
        main.wait()
    for _ in range(1200):
        if not any(map(_alive, children)):
            break
        time.sleep(0.05)
    assert not any(map(_alive, children))


def _children(pid: int) -> list[int]:
    path = f"/proc/{pid}/task/{pid}/children"
    if not os.path.exists(path):
        pytest.skip("this system does not list children")
    with open(path) as file:
        return [int(child) for child in file.read().split()]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_is_killed_is_one_line(source, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="a process was killed"):
        pool.run(_die, [0, 1], 2)


def _die(number, counters):
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_in_a_process_stops_the_others(tokenizer, tmp_path, capsys):
    file = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[333] = '{"body": 3}'
    file.write_text("\n".join(lines))
    words = ["data", str(file), str(tmp_path / "dst"), "--tokenizer", tokenizer, "--workers", "2"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        f'k2jax: {file} line 334 has no field "text" or "messages"; it has: body\n'
    )


def test_conversations_are_written_by_the_template_with_their_mask(
    tokenizer, byte_tokenizer, tmp_path
):
    file, folder = tmp_path / "chat.jsonl", tmp_path / "dst"
    talks = [[*CHAT[:1], {"role": "assistant", "content": f"hello {i}"}] for i in range(60)]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    manifest = tokenise.tokenise(str(file), folder, tokenizer=tokenizer, workers=1)
    opened = tokens.open_tokens(str(folder))
    train = opened.train.store(byte_tokenizer.byte_lengths())
    wanted = [encode(byte_tokenizer, talk, prompt=False) for talk in talks]
    assert all(train.document(d).tolist() in wanted for d in range(train.documents))
    assert sorted(texts_of(opened)) == sorted(f"hello {i}" for i in range(60))
    total = manifest.train + manifest.heldout
    assert total.bytes == sum(len(f"hello {i}") for i in range(60))
    assert total.scored == total.bytes + 60  # <|im_end|>
    assert total.conversations == 60 and opened.train.whole
    plan = Batches(opened.train, 1, 200, 0)
    rows = [plan.batch(step) for step in range(plan.epoch_rows[0])]
    assert sum(row["weights"].sum() for row in rows) == manifest.train.scored
    pieces = [
        row["tokens"][row["segments"] == n]
        for row in rows
        for n in range(1, row["segments"].max() + 1)
    ]
    assert sorted(p.tolist() for p in pieces) == sorted(
        train.document(d)[:-1].tolist() for d in range(train.documents)
    ), "every row has whole conversations"
    heldout = list(eval_batches(opened.heldout, 2, 512))
    assert sum(b["weights"].sum() for b in heldout) == manifest.heldout.scored


def test_a_conversation_of_another_form_is_named_by_its_line(tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + '\n\n{"messages": [{"role": "me"}]}\n')
    with pytest.raises(ConfigError, match=re.escape(f"{file} line 3: messages[0] has the role")):
        tokenise.tokenise(str(file), tmp_path / "dst", tokenizer=tokenizer, workers=1)
    with pytest.raises(ConfigError, match=r"conversation; make tokens of it first: k2jax data"):
        open_data(str(file), vocab=512)


def test_the_folders_own_template_is_used_and_kept(tokenizer, tmp_path):
    template = (
        "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>_{{ m.content }}_"
        "<|im_end|>{% endfor %}"
    )
    (tmp_path / "tok" / "chat_template.jinja").write_text(template)
    file = tmp_path / "chat.jsonl"
    file.write_text((json.dumps({"messages": CHAT}) + "\n") * 60)
    tokenise.tokenise(str(file), tmp_path / "dst", tokenizer=tokenizer, workers=1)
    opened = tokens.open_tokens(str(tmp_path / "dst"))
    assert set(texts_of(opened)) == {"_hello_"}
    (tmp_path / "tok" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"holds tokens made with template \w+, not none"):
        tokenise.tokenise(str(file), tmp_path / "dst", tokenizer=tokenizer, workers=1)


def test_a_tokenizer_is_trained_on_what_is_not_held_out(source, tmp_path, monkeypatch):
    seen = []
    train = tokenise.train_tokenizer

    def spy(texts, vocab, path):
        seen.extend(texts)
        return train(seen, vocab, path)

    monkeypatch.setattr(tokenise, "train_tokenizer", spy)
    tokenise.tokenise(source, tmp_path / "dst", vocab=600, workers=1)
    opened = tokens.open_tokens(str(tmp_path / "dst"))
    assert sorted(texts_of(opened)) == sorted(TEXTS)
    assert len(seen) > 300 and not set(seen) & set(opened.heldout.texts(opened.tokenizer))


def test_other_content_in_the_folder_is_refused(source, tokenizer, tmp_path):
    folder = tmp_path / "dst"
    folder.mkdir()
    (folder / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty: it has mine"):
        tokenise.tokenise(source, folder, tokenizer=tokenizer, workers=1)
    (folder / "mine").unlink()
    tokenise.tokenise(source, folder, tokenizer=tokenizer, workers=1)
    with pytest.raises(ConfigError, match=r"made with tokenizer \w+, not trained on the source"):
        tokenise.tokenise(source, folder, vocab=600, workers=1)
    with pytest.raises(ConfigError, match=r"holds tokens, not text; train on it: --data.path"):
        tokenise.tokenise(str(folder), tmp_path / "again", tokenizer=tokenizer)
    (tmp_path / "src" / "c.txt").write_text("changed")
    with pytest.raises(ConfigError, match="other files than"):
        tokenise.tokenise(source, folder, tokenizer=tokenizer, workers=1)


def test_the_folder_may_lie_within_the_source(source, tokenizer, tmp_path):
    inside = tmp_path / "src" / "tokens"
    first = tokenise.tokenise(source, inside, tokenizer=tokenizer, workers=1)
    assert tokenise.tokenise(source, inside, tokenizer=tokenizer, workers=1) == first
    assert (first.train + first.heldout).documents == 400


def test_two_calls_at_once_do_not_meet(source, tokenizer, tmp_path):
    with (
        tokenise._locked(tmp_path / "dst"),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        tokenise.tokenise(source, tmp_path / "dst", tokenizer=tokenizer)


def test_mistakes_are_named(source, tokenizer, tmp_path, capsys):
    dst = str(tmp_path / "dst")
    one = tmp_path / "one.txt"
    one.write_text("one document")
    for words, says in (
        ([source, dst], "give --tokenizer FILE or --train-tokenizer VOCAB, one of them"),
        ([source + "x", dst, "--tokenizer", tokenizer], "did you mean 'src'?"),
        ([source, dst, "--tokenizer", str(one)], "expected 'base64 rank'"),
        ([str(one), dst, "--tokenizer", tokenizer], "has 1 document(s) with text; training and"),
        ([source, str(one), "--tokenizer", tokenizer], f"cannot read or write {one}: File exists"),
        ([source, dst, "--workers", "-1"], "--workers is -1"),
    ):
        assert cli.main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_folders_of_tokens_open_for_training(source, tokenizer, byte_tokenizer, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    tokenise.tokenise(source, a, tokenizer=tokenizer, workers=1)
    file = tmp_path / "chat.jsonl"
    file.write_text((json.dumps({"messages": CHAT}) + "\n") * 60)
    tokenise.tokenise(str(file), b, tokenizer=tokenizer, workers=1)
    data = open_data(a, vocab=512)
    assert data.tokenizer.digest() == byte_tokenizer.digest() and data.train.size > 10_000
    mixed = open_data(f"{a}:3,{b}:1", tokenizer, vocab=600)
    assert isinstance(mixed.train, Mixture) and mixed.train.weights == (3.0, 1.0)
    assert mixed.heldout_texts() == [
        *data.heldout_texts(),
        *open_data(b, vocab=512).heldout_texts(),
    ]
    assert mixed.heldout_bytes == len("".join(mixed.heldout_texts()).encode())
    parts_of = [Batches(mixed.train, 8, 64, 0).batch(2, [host], 2) for host in range(2)]
    whole = Batches(mixed.train, 8, 64, 0).batch(2)
    for name in NAMES:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts_of]), whole[name])


def test_folders_of_tokens_that_do_not_fit_are_refused(source, tokenizer, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    tokenise.tokenise(source, a, tokenizer=tokenizer, workers=1)
    with pytest.raises(ConfigError, match="has 512 tokens and the model's vocab is 300"):
        open_data(a, vocab=300)
    tokenise.tokenise(source, b, vocab=600, workers=1)
    with pytest.raises(ConfigError, match=f"{a} was made with another tokenizer than {b}"):
        open_data(f"{a}:1,{b}:1", vocab=600)
    with pytest.raises(ConfigError, match=f"{a} was made with another tokenizer than {b}"):
        open_data(a, b, vocab=600)
    with pytest.raises(ConfigError, match=f"{source} is text; a mixture takes folders of tokens"):
        open_data(f"{a}:1,{source}:1", vocab=600)
    Tokenizer.load(b).save(tmp_path / "a" / "tiktoken.model")
    with pytest.raises(ConfigError, match=r"tiktoken.model is not the one"):
        open_data(a, vocab=600)
    (tmp_path / "a" / "tokens.json").write_text('{"format": 1')
    with pytest.raises(ConfigError, match=r"tokens.json is damaged"):
        open_data(a, vocab=600)
