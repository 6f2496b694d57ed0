"""A ledger is the same bytes for any rows, devices, and number of kills; nothing is asked twice."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from guess_task import DEVICES, ITEMS, Guess, drawn, evaluate

from k2jax import sharding
from k2jax.config import ConfigError, MeshConfig
from k2jax.evals import scorer as scorers
from k2jax.evals.compare import compare_ledgers, describe
from k2jax.evals.ledger import read_ledger

SAMPLES = 2 * (ITEMS + 2)
LONG = 300  # seconds: machines may be slow


@pytest.fixture(scope="module")
def model():
    return drawn()


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """The ledger that all others must equal."""
    return evaluate(tmp_path_factory.mktemp("finished"), model=model).ledger


@pytest.mark.parametrize("rows", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_rows_change_no_byte(model, finished, tmp_path, rows):
    assert evaluate(tmp_path, rows, model).ledger.read_bytes() == finished.read_bytes()


@pytest.mark.slow
def test_8_devices_change_no_byte(finished, tmp_path):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(replica=2, expert=4))):
        outcome = evaluate(tmp_path, model=drawn())
    assert outcome.ledger.read_bytes() == finished.read_bytes()


def test_a_ledger_goes_on_where_it_ends_and_asks_nothing_twice(
    model, finished, tmp_path, monkeypatch
):
    lines = finished.read_bytes().splitlines(keepends=True)
    kept = [lines[0], *random.Random(0).sample(lines[1:], 11), lines[5][:30]]
    (tmp_path / "guess.jsonl").write_bytes(b"".join(kept))
    known = {(r["item"], r["sample"]) for r in read_ledger(tmp_path / "guess.jsonl")[1]}
    submitted = []
    submit = scorers.Scorer.submit
    monkeypatch.setattr(
        scorers.Scorer, "submit", lambda self, *a: (submitted.append(a), submit(self, *a))
    )
    assert evaluate(tmp_path, model=model).ledger.read_bytes() == finished.read_bytes()
    missing = [r for r in read_ledger(finished)[1] if (r["item"], r["sample"]) not in known]
    assert len(submitted) == sum(len(r["parts"]) for r in missing)
    submitted.clear()
    assert evaluate(tmp_path, model=model).numbers["samples"] == SAMPLES
    assert not submitted


def test_what_went_wrong_is_counted_beside_the_score(finished, model):
    numbers = evaluate(finished.parent, model=model).numbers
    assert sum(numbers["results"].values()) == numbers["samples"] == SAMPLES
    assert numbers["results"]["error"] == 2
    assert numbers["results"]["truncated"] > 0
    assert any(len(r["parts"]) == 2 for r in read_ledger(finished)[1] if r["item"][:2] == "go")
    assert numbers["score_low"] <= numbers["score"] <= numbers["score_high"]
    failed = [r for r in read_ledger(finished)[1] if r["result"] == "error"]
    assert [r["reason"] for r in failed] == ["ValueError: a grader that fails"] * 2


def test_an_item_draws_the_same_whatever_else_is_asked(model, finished, tmp_path):
    header, records = read_ledger(evaluate(tmp_path, model=model, limit=3).ledger)
    assert header["limit"] == 3
    assert records == read_ledger(finished)[1][:6]
    _, other = read_ledger(evaluate(tmp_path / "seed", model=model, limit=3, seed=1).ledger)
    assert [r["parts"] for r in other] != [r["parts"] for r in records]


def test_comparing_says_which_samples_differ_and_why(model, finished, tmp_path):
    same = compare_ledgers(finished, finished)
    assert (same.samples, same.differences, same.header) == (SAMPLES, (), {})
    other = evaluate(tmp_path, model=model, seed=1).ledger
    found = compare_ledgers(finished, other)
    assert list(found.header) == ["seed"]
    assert {d.why for d in found.differences} <= {"tokens", "prompt"}
    assert not {d.item for d in found.differences} & {"choose", "roll"}
    text = describe(found)
    assert f"{SAMPLES} samples in both" in text and "from token 0 of" in text
    content = finished.read_text().replace('"result":"passed"', '"result":"failed"', 1)
    (tmp_path / "judged.jsonl").write_text(content)
    (judged,) = compare_ledgers(finished, tmp_path / "judged.jsonl").differences
    assert (judged.why, judged.verdicts) == ("verdict", ("passed", "failed"))
    with pytest.raises(ConfigError, match="cannot be read"):
        compare_ledgers(finished, tmp_path / "none")


def start(out: Path, *words: str) -> subprocess.Popen:
    """Start an evaluation, with `words` as one of two processes."""
    here = Path(__file__).parent
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    devices = f"--xla_force_host_platform_device_count={DEVICES if words else 1}"
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*flags, devices]),
        "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(here / "guess_task.py"), str(out), *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def start_two(out: Path) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(out, address, "2", str(number)) for number in range(2)]


def start_one(out: Path) -> list[subprocess.Popen]:
    return [start(out)]


def is_killed(processes: list[subprocess.Popen], out: Path, lines: int, seconds: float) -> bool:
    """Kill the first process once it has added so many lines; False: it had ended before."""
    first, ledger = processes[0], out / "guess.jsonl"
    lines += ledger.read_bytes().count(b"\n") if ledger.exists() else 0
    try:
        while first.poll() is None:
            if ledger.exists() and ledger.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.005)
        time.sleep(seconds)
        first.send_signal(signal.SIGKILL)
        for other in processes[1:]:  # which notice that it is lost
            other.wait(timeout=LONG)
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=LONG)
    return first.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_ledger(finished, tmp_path):
    assert is_killed(start_one(tmp_path), tmp_path, 3, 0)
    assert start(tmp_path).wait(timeout=LONG) == 0
    assert (tmp_path / "guess.jsonl").read_bytes() == finished.read_bytes()


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_same_ledger(finished, tmp_path):
    draw = random.Random(os.urandom(8))
    kills = 0
    while kills < 10:  # where a process ended before its kill, another evaluation begins
        out = tmp_path / str(kills)
        while is_killed(start_one(out), out, draw.randrange(4), draw.random() * 0.05):
            kills += 1
        assert (out / "guess.jsonl").read_bytes() == finished.read_bytes()


@pytest.mark.slow
def test_two_processes_of_8_devices_killed_and_resumed_change_no_byte(finished, tmp_path):
    assert is_killed(start_two(tmp_path), tmp_path, SAMPLES // 2, 0)
    assert (tmp_path / "guess.jsonl").read_bytes() != finished.read_bytes()
    assert [process.wait(timeout=LONG) for process in start_two(tmp_path)] == [0, 0]
    assert (tmp_path / "guess.jsonl").read_bytes() == finished.read_bytes()


def test_settings_out_of_range_get_one_line(model, tmp_path):
    for options, line in (
        ({"settings": {"samples": 0}}, "samples is 0"),
        ({"settings": {"top_p": 0.0}}, "top_p is 0.0"),
        ({"limit": -1}, "limit is -1"),
    ):
        with pytest.raises(ConfigError, match=line):
            evaluate(tmp_path, model=model, **options)
    with pytest.raises(ConfigError, match="rows is 0"):
        evaluate(tmp_path, 0, model)
    assert len(Guess().items()) == ITEMS + 2
