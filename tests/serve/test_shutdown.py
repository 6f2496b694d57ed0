"""A first signal drains and ends with 0, a second one ends at once; addresses are checked."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from serving import user

from k2jax.config import ConfigError
from k2jax.serve import lifecycle

SERVER = Path(__file__).with_name("scripted_server.py")


@pytest.fixture
def started():
    """Start the server with so many seconds a token; the process, and a client that asked."""
    processes = []

    def start(seconds):
        words = [sys.executable, SERVER, str(seconds)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        assert httpx.get(f"{url}/health").status_code == 200  # it says its port when it listens
        return process, url

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ask_in_thread(url):
    answers = []

    def ask():
        try:
            body = {"messages": user(), "stream": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as sent:
                answers.append("")
                for line in sent.iter_lines():
                    answers[0] += line + "\n"
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not answers or "content" not in str(answers[0]):
        time.sleep(0.01)
    return thread, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(started, number):
    process, url = started(0.01)
    thread, answers = ask_in_thread(url)
    process.send_signal(number)
    assert process.wait(60) == 0
    thread.join()
    texts = re.findall('"content":"(a+)"', answers[0])
    assert "".join(texts) == "a" * 100 and "data: [DONE]" in answers[0]
    assert process.stdout.read().strip().endswith("ended")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_second_signal_ends_at_once(started):
    process, url = started(5)
    thread, _ = ask_in_thread(url)
    process.send_signal(signal.SIGTERM)
    assert "draining" in process.stdout.readline() or "draining" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    thread.join()


def test_an_address_that_is_taken_is_refused_in_one_line():
    with lifecycle.bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ConfigError, match=r"cannot serve at 127.0.0.1:\d+: Address already"):
            lifecycle.bind("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(ConfigError, match=r"cannot serve at no\.such\.host"):
        lifecycle.bind("no.such.host.invalid", 80)
