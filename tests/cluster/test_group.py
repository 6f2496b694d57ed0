"""Processes that meet, agree, and notice who is gone. Threads stand in for most of them."""

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from k2jax.cluster import group as groups
from k2jax.cluster import preflight
from k2jax.cluster import rendezvous as meet
from k2jax.cluster.detect import Place
from k2jax.cluster.group import Group, difference
from k2jax.cluster.rendezvous import EXIT_RETRY, Lost
from k2jax.config import ConfigError


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Threads stay when their process would be gone: nobody need wait for the kernel to say so."""
    monkeypatch.setattr(groups, "PARTING", 0.3)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def note_in(told: list):
    return lambda *words: told.append(words)


def together(count: int, what, counts=None, numbers=None, end=note_in):
    """What `what(group)` gives or raises in each process; and how each was ended, if it was."""
    port, found, ended = free_port(), [None] * count, [[] for _ in range(count)]

    def one(i: int) -> None:
        place = Place(
            f"127.0.0.1:{port}", (counts or [count] * count)[i], (numbers or [*range(count)])[i]
        )
        try:
            group = Group(place, end=end(ended[i]))
            found[i] = what(group)
            group.close()
        except (ConfigError, Lost) as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return found, ended


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_say_the_same_agree_and_hear_what_the_first_one_says(count):
    def run(group):
        for topic in ("a", "b", "a"):
            group.require_equal(topic, {"x": 1, "y": "two"})
        return group.tell("word", "from the first" if group.number == 0 else None)

    found, ended = together(count, run)
    assert found == ["from the first"] * count
    assert ended == [[]] * count


def test_a_difference_is_one_line_everywhere_that_names_who_and_what():
    settings = {"optim.tau": 100.0, "data.rows": 8}

    def run(group):
        group.require_equal(
            "settings", settings | ({"optim.tau": 30.0} if group.number == 2 else {})
        )

    found, _ = together(3, run)
    host = socket.gethostname()
    line = f"process 2 ({host}) differs from process 0 ({host}) in optim.tau: 30.0, not 100.0"
    assert [str(error) for error in found] == [line] * 3


def test_a_process_that_ends_while_it_is_being_ended_says_why_once():
    heard = threading.Event()

    def run(group):
        if group.number:
            assert heard.wait(10)
            group.fail("of its own", 1)
        else:
            group.fail("the first reason", 2)

    def end(told):
        return lambda *words: (told.append(words), heard.set())

    found, ended = together(2, run, end=end)
    assert found == [None, None]
    assert ended == [[], [("the first reason", 2)]]


def test_several_that_differ_are_counted_and_further_facts_named():
    names = [f"process {i} (host-{i})" for i in range(7)]
    said = [{"code": "a", "rows": 8}] + [{"code": "b", "rows": 9}] * 6
    assert difference(said, names) == (
        "process 1 (host-1), process 2 (host-2), process 3 (host-3), process 4 (host-4) and 2 more"
        " differ from process 0 (host-0) in code: b, not a (and in rows)"
    )
    assert difference([{"a": 1}, {}], names) == (
        "process 1 (host-1) differs from process 0 (host-0) in a: None, not 1"
    )
    assert difference([{"a": 1}] * 3, names) == ""


def test_processes_that_do_not_come_are_numbered(monkeypatch):
    monkeypatch.setattr(meet, "ARRIVAL", 1.0)
    port, found = free_port(), []

    def one(i):
        try:
            Group(Place(f"127.0.0.1:{port}", 4, i), end=lambda *words: found.append(words[0]))
        except Lost as error:
            found.append(str(error))

    threads = [threading.Thread(target=one, args=(i,)) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    line = f"processes 1, 3 of 4 did not come to 127.0.0.1:{port} within 1 s"
    assert len(found) == 2 and all(line in said for said in found)


def test_a_first_process_that_is_not_there_is_named_by_its_address(monkeypatch):
    monkeypatch.setattr(meet, "ARRIVAL", 0.5)
    port = free_port()
    with pytest.raises(Lost) as error:
        Group(Place(f"127.0.0.1:{port}", 4, 3))
    for part in (
        "process 3 (",
        f"cannot reach process 0 at 127.0.0.1:{port} within 0 s",
        "Connection refused",
        "the port is open",
    ):
        assert part in str(error.value)


CONTRADICTIONS = [
    ({"numbers": [0, 1, 1]}, "two processes say that they are number 1: on "),
    ({"numbers": [0, 1, 0]}, "cannot listen on port"),
    ({"counts": [3, 3, 4]}, "was started as one of 4 processes, process 0 ("),
]


@pytest.mark.parametrize(("start", "says"), CONTRADICTIONS)
def test_processes_that_contradict_each_other_are_told(start, says, monkeypatch):
    monkeypatch.setattr(meet, "ARRIVAL", 2.0)
    found, ended = together(3, lambda group: group.require_equal("a", {}), **start)
    lines = [str(error) for error in found if error] + [line for said in ended for line, _ in said]
    assert any(says in line for line in lines)


@pytest.mark.parametrize("shared", [True, False])
def test_a_run_folder_that_a_process_does_not_see_is_refused(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SIGHT", 0.3)
    outs = [tmp_path / ("a" if shared or i < 2 else "b") for i in range(3)]
    found, _ = together(3, lambda group: preflight.see_folder(group, outs[group.number]))
    host = socket.gethostname()
    line = (
        f"process 2 ({host}) cannot see what process 0 ({host}) writes to --out {outs[0]};"
        " it must be a shared folder"
    )
    assert [error and str(error) for error in found] == [None if shared else line] * 3
    assert list(outs[0].iterdir()) == []  # nothing stays


def test_a_stranger_at_the_door_is_ignored(monkeypatch):
    monkeypatch.setattr(meet, "ARRIVAL", 10.0)
    port, done = free_port(), []

    def first():
        group = Group(Place(f"127.0.0.1:{port}", 2, 0))
        group.require_equal("a", {})
        group.close()
        done.append(0)

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"hello": "x"}\n', b"[1]\n", b""):
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
    group = Group(Place(f"127.0.0.1:{port}", 2, 1))
    group.require_equal("a", {})
    group.close()
    thread.join(10)
    assert done == [0]


PROCESS = """
import sys, time
from k2jax.cluster import group
group.BEAT, group.SILENCE, group.PARTING = 0.2, 1.5, 0.3
me = group.Group(group.Place("127.0.0.1:{port}", 3, int(sys.argv[1])))
print("here", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["gone", "silent"])
def test_a_lost_process_ends_the_others_with_one_line_that_names_it(victim, number):
    words = [sys.executable, "-c", PROCESS.format(port=free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([*words, str(i)], **pipes) for i in range(3)]
    try:
        for job in jobs:
            assert job.stdout.readline() == "here\n"
        jobs[victim].send_signal(number)
        how = "is gone" if number == signal.SIGKILL else "has not been heard of for 2 s"
        for job in jobs:
            if job is not jobs[victim]:
                _, said = job.communicate(timeout=20)
                assert job.returncode == EXIT_RETRY
                assert said.startswith(f"k2jax: process {victim} ({socket.gethostname()}) {how};")
                assert said.count("\n") == 1
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def test_process_0_hears_what_another_one_asks_for_before_and_after_it_listens():
    names, all_asked = [], threading.Event()

    def note(name):
        names.append(name)
        if len(names) == 2:
            all_asked.set()

    def run(group):
        if group.number == 1:
            group.request("drain")
        group.require_equal("one has asked", {})
        if group.number == 0:
            group.on_request("other", note)
            group.on_request("drain", note)
        if group.number == 2:
            group.request("drain")
        if group.number == 0:
            assert all_asked.wait(30)

    found, ended = together(3, run)
    host = socket.gethostname()
    assert (found, ended) == ([None] * 3, [[]] * 3)
    assert names == [f"process 1 ({host})", f"process 2 ({host})"]
