"""A ledger has every sample once, whatever happens to the process that writes it."""

import contextlib
import random
import signal
import subprocess
import sys
import time

import pytest

from k2jax.config import ConfigError
from k2jax.evals.ledger import Ledger, read_ledger

HEADER = {"task": "t", "weights": "w", "settings": {"samples": 2}}


def record(item: str, sample: int = 0):
    return {"item": item, "sample": sample, "score": 1.0}


def write(path, *records):
    with contextlib.closing(Ledger(path, HEADER)) as ledger:
        for one in records:
            ledger.add(one)


def test_the_finished_file_does_not_depend_on_the_order_of_samples(tmp_path):
    order = [("a", 0), ("a", 1), ("b", 0)]
    contents = []
    for number, keys in enumerate((order, order[::-1])):
        path = tmp_path / f"{number}.jsonl"
        with contextlib.closing(Ledger(path, HEADER)) as ledger:
            for key in keys:
                ledger.add(record(*key))
            ledger.finish(order)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert [(r["item"], r["sample"]) for r in read_ledger(path)[1]] == order


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    write(path, record("a"), record("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert len(read_ledger(path)[1]) == 1
    with contextlib.closing(Ledger(path, HEADER)) as ledger:
        assert list(ledger.records) == [("a", 0)]
        ledger.add(record("b"))
    assert path.read_bytes() == whole


def test_a_file_that_was_killed_in_its_header_begins_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:9])
    write(path)
    assert path.read_bytes() == whole


def test_nothing_is_scored_twice(tmp_path):
    with contextlib.closing(Ledger(tmp_path / "a.jsonl", HEADER)) as ledger:
        ledger.add(record("a"))
        with pytest.raises(ValueError, match="in the ledger already"):
            ledger.add(record("a"))


def test_a_ledger_of_another_evaluation_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, record("a"))
    line = r"another evaluation, weights is \"w\" there and \"x\" here; choose another --out"
    with pytest.raises(ConfigError, match=line):
        Ledger(path, HEADER | {"weights": "x"})
    with pytest.raises(ConfigError, match=r"settings\.samples is 2 there and 3 here"):
        Ledger(path, HEADER | {"settings": {"samples": 3}})
    with pytest.raises(ConfigError, match="seed is null there and 1 here"):
        Ledger(path, HEADER | {"seed": 1})


def test_two_processes_do_not_write_one_ledger(tmp_path):
    with (
        contextlib.closing(Ledger(tmp_path / "a.jsonl", HEADER)),
        pytest.raises(ConfigError, match="written by another process"),
    ):
        Ledger(tmp_path / "a.jsonl", HEADER)


def test_damage_gets_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, record("a"), record("b"))
    lines = path.read_bytes().splitlines(keepends=True)
    for content, line in (
        (b"".join([lines[0], b"{\n", lines[2]]), "line 2 is damaged: it is not JSON"),
        (b"".join([lines[0], b"[]\n", lines[2]]), "damaged in line 2"),
        (lines[1], "no ledger of an evaluation"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=line):
            Ledger(path, HEADER)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ledger(tmp_path / "none.jsonl")


WRITER = """
import contextlib, sys, time
from pathlib import Path
from k2jax.evals.ledger import Ledger
keys = [(str(i), 0) for i in range(150)]
with contextlib.closing(Ledger(Path(sys.argv[1]), {"task": "t"})) as ledger:
    for item, sample in reversed(keys):
        if (item, sample) not in ledger.records:
            ledger.add({"item": item, "sample": sample, "text": item * 3000})
            time.sleep(0.002)
    ledger.finish(keys)
"""


def test_ten_kills_leave_the_ledger_of_a_process_that_was_not_killed(tmp_path):
    draw = random.Random(0)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    subprocess.run([sys.executable, "-c", WRITER, str(whole)], check=True, timeout=100)
    for kill in range(1, 11):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        try:
            while process.poll() is None:
                if path.exists() and path.read_bytes().count(b"\n") > 12 * kill:
                    break
                time.sleep(0.001)
            time.sleep(draw.random() * 0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=100)
        if kill % 3 == 0:  # and a line that was being written
            path.write_bytes(path.read_bytes()[:-7])
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True, timeout=100)
    assert path.read_bytes() == whole.read_bytes()
