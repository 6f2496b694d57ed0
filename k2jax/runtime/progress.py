"""How far a long job is: a bar on a terminal, else a line now and then."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

QUIET = 10.0  # seconds between lines where there is no terminal
REFRESH = 0.1  # seconds between changes of a bar


class Progress:
    """Shows the progress of one job; use it as a context manager. Threads may share one.

    Nothing is drawn, and no library of bars loaded, where stdout is not a terminal.
    """

    def __init__(
        self,
        total: float,
        say: Callable[[str], None],
        describe: Callable[["Progress"], str] | None = None,
        *,
        done: float = 0.0,
        counted: bool = False,
    ):
        """Describe the job.

        Args:
            total: its size in any unit: steps, bytes, shares.
            say: is called with each line where there is no terminal.
            describe: makes the text that `add` and `update` show; without it they show a share.
            done: how much of it was done before.
            counted: whether a bar also shows `done/total` and the time left.
        """
        self.total, self.say, self.describe = total, say, describe or _share
        self.done, self.counted = done, counted
        self.bar: Any = None
        self.live: Any = None
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Start the clock now: what came before says nothing about the speed."""
        self._began = self._shown = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the clock started."""
        return max(time.monotonic() - self._began, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Seconds until the end at the speed so far; 0 where nothing is done yet."""
        return self.elapsed * (self.total - self.done) / self.done if self.done else 0.0

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if sys.stdout.isatty():
            from rich import progress
            from rich.live import Live

            columns = [progress.BarColumn(None), progress.TextColumn("{task.description}")]
            if self.counted:
                columns = [progress.MofNCompleteColumn(), *columns, progress.TimeRemainingColumn()]
            self.bar = progress.Progress(*columns, expand=True)
            self.live = Live(self.bar, refresh_per_second=4)
            self.live.start()
            self._task = self.bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        if self.live is not None:
            self.live.stop()

    def add(self, amount: float) -> None:
        """Report that `amount` more is done; shown if it was not for some time."""
        with self._lock:
            self.update(self.done + amount)

    def update(self, done: float) -> None:
        """Report how much is done; shown if it was not for some time."""
        self.done, now = done, time.monotonic()
        if now - self._shown >= (QUIET if self.bar is None else REFRESH):
            self._shown = now
            self.show(done, self.describe(self))

    def show(self, done: float, text: str, details: Any = None, *, line: bool = True) -> None:
        """Report how much is done, and show it now.

        Args:
            done: in the unit of `total`.
            text: beside the bar, or the line.
            details: something that rich can draw, below the bar.
            line: whether a line is due where there is no bar.
        """
        self.done = done
        if self.bar is not None:
            from rich.console import Group

            self.bar.update(self._task, completed=done, description=text)
            self.live.update(self.bar if details is None else Group(self.bar, details))
        elif line:
            self.say(text)


def _share(job: Progress) -> str:
    return f"{job.done / job.total:.0%}"
