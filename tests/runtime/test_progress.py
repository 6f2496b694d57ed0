"""Progress of a long job: a bar on a terminal, a line now and then elsewhere."""

import io
import threading

import pytest
from rich.console import Console

from k2jax.runtime import progress
from k2jax.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock[0]` is its time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def describe(job: Progress) -> str:
    return f"{job.done:.0f} of {job.total:.0f}, {job.seconds_left:.0f} s left"


def test_without_a_terminal_there_is_a_line_every_ten_seconds(clock, capsys):
    lines: list[str] = []
    with Progress(100, lines.append, describe) as job:
        for seconds in (4.0, 9.9, 10.0, 15.0, 20.0):
            clock[0] = 100.0 + seconds
            job.update(seconds)
    assert lines == ["10 of 100, 90 s left", "20 of 100, 80 s left"]
    assert not capsys.readouterr().out


def test_what_came_before_the_clock_started_is_not_in_the_rate(clock):
    job = Progress(100, print, describe)
    clock[0] += 1_000
    job.restart()
    clock[0] += 5
    job.update(10)
    assert (job.elapsed, job.seconds_left) == (5, 45)


def test_threads_share_one():
    job = Progress(8_000, lambda line: None, describe)

    def work():
        for _ in range(1_000):
            job.add(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert job.done == 8_000


def test_a_line_is_shown_at_once_when_it_is_due():
    lines: list[str] = []
    job = Progress(10, lines.append)
    job.show(1, "one", line=False)
    job.show(2, "two")
    assert lines == ["two"]


def test_a_terminal_has_a_bar_its_text_and_details_below_it(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    lines: list[str] = []
    console = Console(record=True, width=80, file=io.StringIO())
    with Progress(10, lines.append, counted=True, done=3) as job:
        job.show(4, "loss 3.2", details="below")
        console.print(job.live.renderable)
    text = console.export_text()
    assert "4/10" in text and "loss 3.2" in text and "below" in text
    assert not lines
