"""`k2jax serve` in several real processes: a signal to any of them drains and ends all."""

import json
import re
import signal
import socket
import sys
import threading
from pathlib import Path

import httpx
import pytest
from jobs import end, make_environment, start, write_run

HOST = socket.gethostname()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run, and the caches that all processes share."""
    pytest.importorskip("uvicorn")
    folder = tmp_path_factory.mktemp("serving")
    write_run(folder / "run")
    return folder


def serve(place: Path, count: int):
    """Processes that serve, where, and a client that waits for the end of a long answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["serve", str(place / "run"), "--port", "0", "--log", "none", "--slots", "6"]
    words += ["--mesh.replica", str(count), "--coordinator", address, "--processes", str(count)]
    command = [sys.executable, "-m", "k2jax.cli", *words, "--process"]
    environment = make_environment(place)
    return [start([*command, str(number)], environment) for number in range(count)]


def read_address(process) -> str:
    line = process.stdout.readline()
    assert "serving" in line, process.stderr.read()
    return re.search(r"http://\S+", line)[0]


@pytest.mark.parametrize("signalled", [[1], [0], [0, 1, 2]], ids=str)
def test_a_signal_to_any_process_drains_and_ends_all(place, signalled):
    processes, pieces, begun = serve(place, 3), [], threading.Event()

    def ask(url: str) -> None:
        body = {"prompt": "def f", "max_tokens": 50, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=200) as answer:
            for line in answer.iter_lines():
                pieces.append(line)
                begun.set()

    try:
        url = read_address(processes[0])
        client = threading.Thread(target=ask, args=(url,))
        client.start()
        assert begun.wait(200)
        for number in signalled:
            processes[number].send_signal(signal.SIGTERM)
        client.join(200)
    finally:
        ended = end(processes, 200)
    assert "data: [DONE]" in pieces
    *_, last = (json.loads(p[6:]) for p in pieces if p.startswith("data: {"))
    assert last["choices"][0]["finish_reason"] in ("length", "stop")
    assert [code for code, _, _ in ended] == [0] * 3, ended
    for number, (_, _, lines) in enumerate(ended):
        ours = [line for line in lines if "drain" in line]
        assert len(ours) == (number > 0), ended  # process 0 was asked for no log
        if number and number in signalled:
            assert ours[0].startswith("k2jax: draining: process 0 answers running requests")


def test_a_signal_before_the_server_listens_ends_all(place):
    processes = serve(place, 2)
    for line in processes[0].stderr:
        if "2 processes on 1 host" in line:
            break
    processes[1].send_signal(signal.SIGTERM)
    (first, _, lines), (second, _, others) = end(processes, 200)
    assert (first, second) == (128 + signal.SIGTERM,) * 2
    assert lines[-1] == f"k2jax: process 1 ({HOST}) ended: stopped by SIGTERM"
    assert others == ["k2jax: stopped by SIGTERM"]
