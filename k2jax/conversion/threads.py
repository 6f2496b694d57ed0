"""Many tensors at once, within a ceiling of memory, with progress."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

GB = 10**9
QUIET = 10.0  # seconds between lines where there is no terminal


class Budget:
    """Bytes that may be on their way at a time."""

    def __init__(self, limit: int):
        self.limit, self._free = limit, limit
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold `size` bytes; waits until they are free."""
        size = min(size, self.limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


class Progress:
    """Says how far it is: GB, GB/s, time left. One line that is rewritten on a terminal."""

    def __init__(self, total: int, what: str, say: Callable[[str], None]):
        self.total, self.what, self.say = total, what, say
        self.done = 0
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._began = self._told = time.monotonic()

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        with self._lock:
            self.done += size
            now = time.monotonic()
            if now - self._told < (0.2 if self._terminal else QUIET):
                return
            self._told = now
            rate = self.done / (now - self._began)
            left = (self.total - self.done) / rate if rate else 0
            line = (
                f"{self.what} {self.done / GB:.1f} of {self.total / GB:.1f} GB,"
                f" {rate / GB:.2f} GB/s, {left:.0f} s left"
            )
        if self._terminal:
            sys.stderr.write(f"\r{line}\033[K")
        else:
            self.say(line)

    def close(self) -> None:
        """End the line."""
        if self._terminal and self.done:
            sys.stderr.write("\r\033[K")


def each(jobs: Iterable[Any], do: Callable[[Any], None], threads: int) -> None:
    """Call `do` for every job, several at a time; the first failure ends it, and is raised."""
    queue, lock, stop = iter(jobs), threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                job = next(queue, None)
            if job is None:
                return
            do(job)

    pool = ThreadPoolExecutor(threads)
    try:
        for future in as_completed([pool.submit(work) for _ in range(threads)]):
            future.result()
    finally:
        stop.set()
        pool.shutdown()
