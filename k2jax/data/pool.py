"""Numbered pieces of work in several processes, which end when their parent does."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from k2jax.config import ConfigError
from k2jax.runtime.hardware import count_cores

TICK = 0.5  # seconds between looks at the counters

# What a process works on: set once in each, since it is large.
_work: Callable[[int, "Counters"], None] | None = None
_counters: "Counters | None" = None


class Counters:
    """Documents and bytes that all processes have done, and whether they are to stop."""

    def __init__(self, values: Any = None, seen: Callable[["Counters"], None] | None = None):
        """Count in `values`, three shared integers, or alone; `seen` is called at every change."""
        self._values: Any = values or [0, 0, 0]
        self._seen = seen

    @property
    def documents(self) -> int:
        """Done so far."""
        return self._values[0]

    @property
    def bytes(self) -> int:
        """Of their text."""
        return self._values[1]

    @property
    def stopped(self) -> bool:
        """Whether a process failed, so that the others' work is in vain."""
        return bool(self._values[2])

    def add(self, documents: int, size: int) -> None:
        """Count documents, of `size` bytes together."""
        if self._seen:
            self._values[0] += documents
            self._values[1] += size
            self._seen(self)
            return
        with self._values.get_lock():
            self._values[0] += documents
            self._values[1] += size

    def stop(self) -> None:
        """Ask all processes to end."""
        self._values[2] = 1


def run(
    work: Callable[[int, Counters], None],
    numbers: Sequence[int],
    workers: int = 0,
    seen: Callable[[Counters], None] = lambda counters: None,
) -> None:
    """Call `work(number, counters)` for every number; which process does which is open.

    Args:
        work: can be pickled; returns early, its work undone, when `counters.stopped`.
        numbers: of the pieces of work.
        workers: processes; 0: one for every core this process may use. One works right here.
        seen: called now and then.

    Raises:
        ConfigError: from `work`, or a process was killed.
    """
    workers = min(workers or count_cores(), len(numbers))
    if workers <= 1:
        counters = Counters(seen=seen)
        for number in numbers:
            work(number, counters)
        return
    # Fresh processes: a fork would copy whatever threads held.
    context = multiprocessing.get_context("spawn")
    values = context.Array("q", 3)
    counters = Counters(values)
    with futures.ProcessPoolExecutor(workers, context, _begin, (work, values)) as pool:
        todo = iter(numbers)
        # A few ahead: to look at all parts of a large source again and again would take time.
        waiting = {pool.submit(_run, number) for number in islice(todo, 2 * workers)}
        try:
            while waiting:
                done, waiting = futures.wait(waiting, TICK, futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                waiting |= {pool.submit(_run, number) for number in islice(todo, len(done))}
                seen(counters)
        except BrokenProcessPool:
            raise ConfigError(
                "a process was killed, maybe for want of memory; the same command goes on, with"
                " fewer --workers if need be"
            ) from None
        finally:
            counters.stop()
            pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[int, Counters], None], values: Any) -> None:
    global _work, _counters
    _work, _counters = work, Counters(values)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _run(number: int) -> None:
    assert _work and _counters
    _work(number, _counters)
