"""`k2jax evaluate --tasks`: what it prints and leaves, and what it refuses."""

import json

import pytest
from guess_task import BYTES, CFG

from k2jax import cli
from k2jax.checkpoint import Checkpoints
from k2jax.config import RunConfig, to_json
from k2jax.params.arrays import initial
from k2jax.params.kimi import declare_kimi
from k2jax.text.kimi_tokenizer import FILE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    with Checkpoints(folder / "run") as checkpoints:
        params = initial(declare_kimi(CFG), 0, CFG.init_std)
        checkpoints.save(1, {"params": params}, {"config": to_json(RunConfig(model=CFG))})
    BYTES.save(folder / "run" / FILE)
    rows = [{"context": f"{i} <b>", "choices": [" a", " b"], "answer": i % 2} for i in range(6)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "a.txt").write_text("a text\n" * 30)
    return folder


def evaluate(place, *words):
    return cli.main(["evaluate", str(place / "run"), *words])


def test_tasks_leave_ledgers_numbers_and_pages(place, capsys):
    out = place / "out"
    words = ["--tasks", f"choice:{place}/q.jsonl", "--tasks", f"text:{place}/a.txt"]
    assert evaluate(place, *words, "--out", str(out), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["choice"]["samples"] == 6
    assert printed["text"]["bytes"] == 210
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{suffix}" for name in ("choice", "text") for suffix in ("html", "json", "jsonl")
    ]
    page = (out / "choice.html").read_text()
    assert "<h1>choice" in page and "http" not in page.replace("http://www.w3.org", "")
    before = (out / "choice.jsonl").read_bytes()
    assert evaluate(place, *words, "--out", str(out)) == 0
    assert "choice: 6 items, 6 samples" in capsys.readouterr().out
    assert (out / "choice.jsonl").read_bytes() == before
    assert cli.main(["evaluate", "--compare", *[str(out / "choice.jsonl")] * 2]) == 0
    assert "0 differ" in capsys.readouterr().out
    assert evaluate(place, *words, "--out", str(out), "--seed", "1") == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--limit", "3"], "--limit needs --tasks"),
        (["--preset", "k2/math-500"], "needs --tasks FILE"),
        (["--tasks", "choice:none"], "none cannot be read"),
        (["--tasks", "text:{}/a.txt", "--max-length", "9999"], "max_length is 9999"),
        (["--tasks", "text:{}/a.txt", "--cache-tokens", "16"], "the cache has room for"),
        (["--tasks", "text:{}/a.txt", "--limit", "-1"], "limit is -1"),
        (["--compare", "a", "b"], "--compare takes two ledgers"),
    ],
)
def test_mistakes_get_one_line(place, capsys, words, line):
    out = ["--out", str(place / "none")] if "--tasks" in words else []
    assert evaluate(place, *[word.format(place) for word in words], *out) == 2
    printed = capsys.readouterr()
    assert line in printed.err and printed.out == ""


def test_without_a_checkpoint_only_ledgers_are_compared(capsys):
    assert cli.main(["evaluate"]) == 2
    assert "evaluate needs a checkpoint" in capsys.readouterr().err
