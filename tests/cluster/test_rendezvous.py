"""Strangers at process 0's port: they take no place, end nothing, and are counted."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from k2jax.cluster import group as groups
from k2jax.cluster import rendezvous
from k2jax.cluster.detect import Place
from k2jax.cluster.group import Group
from k2jax.cluster.key import KEY, KEY_FILE, is_proof, prove, read_key
from k2jax.cluster.rendezvous import Lost
from k2jax.config import ConfigError

SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(groups, "PARTING", 0.3)
    monkeypatch.setattr(rendezvous, "ARRIVAL", 60.0)
    for name in (KEY, KEY_FILE):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def process_zero(count: int, host: str = "127.0.0.1"):
    """Its port, and what becomes of it: a group once the others have come, or an error."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = []

    def start() -> None:
        try:
            result.append(Group(Place(f"{host}:{port}", count, 0), end=lambda *_: None))
        except (ConfigError, Lost) as error:
            result.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    try:
        yield port, result
    finally:
        thread.join(60)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    until = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 30)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def say(port: int, *messages) -> list[dict]:
    """A stranger's words, one after each answer; the answers until process 0 hangs up."""
    answers = []
    with connect(port) as stranger:
        lines = stranger.makefile("rb")
        for message in messages:
            stranger.sendall(json.dumps(message).encode() + b"\n")
            line = lines.readline()
            if not line:
                break
            answers.append(json.loads(line))
        else:
            with suppress(OSError):
                assert lines.readline() == b""
    return answers


def meet(port: int, result: list, count: int = 2) -> Group:
    """The others come one after the other, and all of them agree. Process 0's group."""
    others = [Group(Place(f"127.0.0.1:{port}", count, i)) for i in range(1, count)]
    until = time.monotonic() + 30
    while not result:
        assert time.monotonic() < until
        time.sleep(0.01)
    threads = [threading.Thread(target=g.require_equal, args=("a", {})) for g in (*others, *result)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    threads = [threading.Thread(target=g.close) for g in (*others, *result)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return result[0]


HELLOS = {
    "out of range": {"hello": 99, "count": 2},
    "negative": {"hello": -1, "count": 2},
    "boolean": {"hello": True, "count": 2},
    "fraction": {"hello": 1.0, "count": 2},
    "of process 0": {"hello": 0, "count": 2},
    "of another count": {"hello": 1, "count": 9},
    "without count": {"hello": 1},
    "none": {"topic": "a", "facts": {}},
    "end": {"end": "mine", "code": 2},
}


def test_without_a_key_hellos_that_cannot_be_are_ignored_and_counted(capsys):
    with process_zero(2) as (port, result):
        for hello in HELLOS.values():
            say(port, hello)
        group = meet(port, result)
    assert group.refused == len(HELLOS)
    # One line, however many come; and on this machine's own address nothing is open to others.
    assert capsys.readouterr().err == (
        "k2jax: refused 127.0.0.1, which says that it is process 99: a process says that it is"
        " number 99 of 2: on None; further ones are counted only\n"
    )


def test_a_number_that_is_taken_is_refused_and_the_run_waits_for_the_right_one():
    with process_zero(3) as (port, result):
        with connect(port) as first:
            first.sendall(b'{"hello": 1, "count": 3, "host": "a"}\n')
            assert b"welcome" in first.recv(100)
            with pytest.raises(ConfigError, match="two processes say that they are number 1: on a"):
                Group(Place(f"127.0.0.1:{port}", 3, 1))
        assert meet(port, result, 3).refused == 1


def test_what_speaks_no_json_is_dropped_without_a_word(capsys):
    with process_zero(2) as (port, result):
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[" * 5_000 + b"\n",
            b"x" * 70_000,
            b"[1]\n",
            b"",
        ):
            with suppress(OSError), connect(port) as stranger:
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                stranger.recv(1)
        assert meet(port, result).refused == 5
    assert capsys.readouterr().err == ""


def test_with_a_key_only_who_proves_it_has_a_place(monkeypatch, capsys):
    monkeypatch.setenv(KEY, SECRET)
    hello = {"hello": 1, "count": 2, "host": "a\x1b[2J", "challenge": "0" * 64}
    with process_zero(2) as (port, result):
        (asked,) = say(port, hello, {})
        assert asked.keys() == {"challenge", "proof"}
        facts = [asked["challenge"], "0" * 64, 1, 2, hello["host"]]
        assert is_proof(asked["proof"], SECRET.encode(), "process 0", *facts)
        # Process 0's own proof sent back, one from another connection, no text, none at all.
        old = prove(SECRET.encode(), "newcomer", *facts)
        for proof in (asked["proof"], old, 7, "ü", None):
            assert len(say(port, hello, {"proof": proof})) == 1
        say(port, {"hello": 1, "count": 9}, {})
        assert meet(port, result).refused == 7
    assert capsys.readouterr().err.count("\n") == 1


def assert_not_welcome(monkeypatch, port, error, why):
    """A process that comes with the environment as it is now; process 0 keeps on waiting."""
    monkeypatch.setattr(rendezvous, "ARRIVAL", 1.0)
    with pytest.raises(error, match=why):
        Group(Place(f"127.0.0.1:{port}", 2, 1))
    monkeypatch.setattr(rendezvous, "ARRIVAL", 60.0)


def test_sides_with_unlike_keys_do_not_trust_each_other(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with process_zero(2) as (port, result):
        connect(port).close()  # it has read its key
        monkeypatch.setenv(KEY, "another key of some length")
        assert_not_welcome(monkeypatch, port, Lost, "does not prove the shared key")
        monkeypatch.delenv(KEY)
        needs = f"process 0 asks for a shared key; set {KEY} or"
        assert_not_welcome(monkeypatch, port, ConfigError, needs)
        monkeypatch.setenv(KEY, SECRET)
        group = meet(port, result)
    assert group.refused >= 3
    assert group.refusal == "it goes before it is welcome"


def test_a_process_with_a_key_does_not_trust_one_without(monkeypatch):
    with process_zero(2) as (port, result):
        connect(port).close()
        monkeypatch.setenv(KEY, SECRET)
        assert_not_welcome(monkeypatch, port, Lost, "it closed the connection")
        monkeypatch.delenv(KEY)
        group = meet(port, result)
    assert group.refusal == f"it has a shared key and process 0 has none ({KEY})"


def test_a_welcome_without_proof_does_not_bind_a_process_that_has_the_key(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = stranger.accept()
                    connection.recv(1000)
                    connection.sendall(b'{"end": "as I say", "code": 2}\n{"welcome": "x"}\n')

        threading.Thread(target=answer, daemon=True).start()
        port = stranger.getsockname()[1]
        assert_not_welcome(monkeypatch, port, Lost, "what answers there does not prove the shared")


def test_the_line_on_who_did_not_come_counts_who_was_refused(monkeypatch):
    monkeypatch.setattr(rendezvous, "ARRIVAL", 3.0)
    with process_zero(2) as (port, result):
        say(port, HELLOS["of another count"])
    assert "process 1 of 2 did not come" in str(result[0])
    assert "; refused connections: 1, the first process: process 1 (None) was st" in str(result[0])


def test_a_flood_of_silent_connections_displaces_itself(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(rendezvous, "GUESTS", 8)
    with process_zero(4) as (port, result):
        silent = [connect(port) for _ in range(40)]
        assert meet(port, result, 4).refused >= 32
        for stranger in silent:
            stranger.close()


def test_a_port_that_others_reach_is_called_open_unless_there_is_a_key(monkeypatch, capsys):
    with process_zero(2, "0.0.0.0") as (port, result):
        meet(port, result)
    assert capsys.readouterr().err == (
        f"k2jax: port {port} is open to the network: whoever reaches it may take a process's place;"
        f" set {KEY} or {KEY_FILE} to the same secret on all hosts\n"
    )
    monkeypatch.setenv(KEY, SECRET)
    with process_zero(2, "0.0.0.0") as (port, result):
        meet(port, result)
    assert capsys.readouterr().err == ""


def test_the_key_comes_from_the_environment_or_a_file(monkeypatch, tmp_path):
    assert read_key() is None
    monkeypatch.setenv(KEY, "short")
    with pytest.raises(ConfigError, match="has 5 characters; it must have at least 16"):
        read_key()
    file = tmp_path / "key"
    monkeypatch.setenv(KEY_FILE, str(file))
    with pytest.raises(ConfigError, match="both set"):
        read_key()
    monkeypatch.delenv(KEY)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key()
    file.write_text("")
    with pytest.raises(ConfigError, match="has 0 characters"):
        read_key()
    file.write_text(SECRET + "\n")
    assert read_key() == SECRET.encode()
