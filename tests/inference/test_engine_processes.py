"""The engine in two real processes over loopback: the tokens of one, and none hangs at a loss."""

import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_engine_model import check_greedy, requests_of
from test_generate import drawn

from k2jax.cluster import EXIT_RETRY
from k2jax.inference.request import join_outputs

WORKER = Path(__file__).with_name("engine_worker.py")
LONG = 240  # seconds: machines may be slow
pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Start the engine in two processes; both are gone at the end."""
    started = []

    def run(what: str) -> list[subprocess.Popen]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        environment = os.environ | {
            "XLA_FLAGS": " ".join(flags),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        for number in range(2):
            words = [address, "2", str(number), what, str(tmp_path / "events")]
            command = [sys.executable, str(WORKER), *words]
            started.append(subprocess.Popen(command, env=environment, **pipes))
        return started

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_200_requests_that_come_and_go_in_two_processes_get_the_full_forwards_tokens(
    start, tmp_path
):
    for process in start("arrivals"):
        _, errors = process.communicate(timeout=LONG)
        assert process.returncode == 0, errors
    events = pickle.loads((tmp_path / "events").read_bytes())
    results = [join_outputs(each) for each in events]
    reasons = [result.finish_reason for result in results]
    assert all(reasons.count(reason) > 5 for reason in ("length", "stop", "abort"))
    check_greedy(drawn(), requests_of(200, greedy=True), results)


@pytest.mark.parametrize("what", ["run", "serve"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_between_tokens_ends_the_other_with_one_line(start, what, lost):
    processes = start(what)
    assert processes[0].stdout.readline() == "began\n", processes[0].communicate()[1]
    processes[lost].kill()
    _, errors = processes[1 - lost].communicate(timeout=LONG)
    assert processes[1 - lost].returncode == EXIT_RETRY, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("k2jax: ")]
    assert f"process {lost}" in line and "give the same command" in line
    assert "Traceback" not in errors
    assert processes[lost].wait() == -signal.SIGKILL
