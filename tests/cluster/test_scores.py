"""evaluate and generate in real processes over loopback: as one process, and when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import write_run

from k2jax.cluster import EXIT_RETRY

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run, text to score, and the caches that all processes share."""
    folder = tmp_path_factory.mktemp("scores")
    write_run(folder / "run")
    line = "def f(x): return x + 1\n"
    (folder / "short.txt").write_text(line * 60)
    (folder / "long.txt").write_text(line * 20_000)
    return folder


class Job:
    """One verb in some processes of this machine."""

    def __init__(self, place: Path, count: int, verb: str, *words: str, mesh: str = ""):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        axes = [word for axis in mesh.split() for word in (f"--mesh.{axis[:-1]}", axis[-1])]
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        environment = os.environ | {
            "XLA_FLAGS": " ".join(flags),
            "K2JAX_CACHE": str(place),
            "JAX_COMPILATION_CACHE_DIR": str(place / "programs"),
        }
        command = [sys.executable, "-m", "k2jax.cli", verb, str(place / "run"), *words, *axes]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.processes = []
        for number in range(count):
            by_hand = ["--coordinator", address, "--processes", str(count), "--process"]
            one = [*command, *([*by_hand, str(number)] if count > 1 else ())]
            self.processes.append(subprocess.Popen(one, env=environment, **pipes))

    def end(self, seconds: float = 240) -> list[tuple[int, str, list[str]]]:
        """Exit code, stdout, and our own lines of stderr, of each process."""
        ended = []
        try:
            for process in self.processes:
                printed, errors = process.communicate(timeout=seconds)
                assert "Traceback" not in errors, errors
                ours = [line for line in errors.splitlines() if line.startswith("k2jax: ")]
                ended.append((process.returncode, printed, ours))
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return ended

    def result(self) -> dict:
        """What process 0 prints; the others print nothing, and all of them end well."""
        (code, printed, lines), *others = self.end()
        assert code == 0, lines
        assert all((code, printed) == (0, "") for code, printed, _ in others)
        return json.loads(printed)


def assert_as_one_process(place: Path, count: int, mesh: str) -> None:
    words = ("--data", str(place / "short.txt"), "--rows", "4", "--json")
    one = Job(place, 1, "evaluate", *words).result()
    several = Job(place, count, "evaluate", *words, mesh=mesh).result()
    assert several["nats_per_token"] == pytest.approx(one["nats_per_token"], abs=1e-6)
    for name in ("tokens", "bytes", "gzip_bits_per_byte"):
        assert several[name] == one[name]


def assert_greedy_tokens_equal(place: Path, count: int, mesh: str) -> None:
    words = ("--prompt", "def f", "--prompt", "x", "--max-new-tokens", "6", "--json")
    one = Job(place, 1, "generate", *words).result()["samples"]
    assert Job(place, count, "generate", *words, mesh=mesh).result()["samples"] == one


def test_two_processes_score_as_one(place):
    assert_as_one_process(place, 2, "data2")


@pytest.mark.slow
def test_two_processes_generate_what_one_does(place):
    assert_greedy_tokens_equal(place, 2, "expert2")
    assert_greedy_tokens_equal(place, 2, "context2 data2 model2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", ["data2 expert2 model2", "expert4 model2", "context2 data2 expert2"]
)
def test_four_processes_score_and_generate_as_one(place, mesh):
    assert_as_one_process(place, 4, mesh)
    assert_greedy_tokens_equal(place, 4, mesh)


@pytest.mark.slow
def test_ledgers_of_two_processes_are_those_of_one(place):
    words = ("--tasks", f"text:{place / 'short.txt'}", "--json", "--rows", "4", "--out")
    for number, (count, mesh) in enumerate(((1, ""), (2, "replica2"), (2, "expert2"))):
        Job(place, count, "evaluate", *words, str(place / f"out{number}"), mesh=mesh).result()
    one, *several = ((place / f"out{number}/text.jsonl").read_bytes() for number in range(3))
    assert several == [one, one]


@pytest.mark.slow
def test_a_lost_process_ends_the_others_with_one_line(place):
    job = Job(place, 2, "evaluate", "--data", str(place / "long.txt"), mesh="data2")
    for line in job.processes[0].stderr:
        if "2 processes on 1 host" in line:
            break
    job.processes[1].kill()
    (code, printed, lines), (victim, _, _) = job.end(60)
    assert (code, victim, printed) == (EXIT_RETRY, -signal.SIGKILL, "")
    assert lines == [
        f"k2jax: process 1 ({HOST}) is gone; all others end here, and give the same command on all"
        " hosts again"
    ]


@pytest.mark.slow
def test_processes_with_unlike_options_are_told_which(place):
    job = Job(place, 2, "generate", "--prompt", "a", mesh="data2")
    words = [*job.processes[1].args, "--temperature", "1"]
    job.processes[1].kill()
    job.processes[1].communicate()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job.processes[1] = subprocess.Popen(words, **pipes)
    for code, printed, lines in job.end(100):
        assert (code, printed, len(lines)) == (2, "", 1)
        assert lines[0].endswith("in --temperature: 1.0, not 0.0")
