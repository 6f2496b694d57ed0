"""Many tensors at once, within a ceiling of memory, with progress."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from k2jax.runtime.progress import Progress

GB = 10**9


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


def show_bytes(total: int, what: str, say: Callable[[str], None]) -> Progress:
    """Show how many of `total` bytes are done: GB, GB/s, time left."""

    def describe(job: Progress) -> str:
        rate = job.done / job.elapsed
        return (
            f"{what} {job.done / GB:.1f} of {job.total / GB:.1f} GB,"
            f" {rate / GB:.2f} GB/s, {job.seconds_left:.0f} s left"
        )

    return Progress(total, say, describe)


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
