"""Stop a run between two steps when the machine asks for it."""

import os
import signal
import threading
from types import FrameType

import jax


class Stopped(Exception):
    """A stop was asked for, and nothing is left to save."""


class Stop:
    """While open, SIGTERM, SIGUSR1 and a first Ctrl-C ask for a stop instead of ending the process.

    Clusters announce the end with SIGTERM, SLURM with what its `--signal` says, often SIGUSR1;
    either may come again. A second Ctrl-C interrupts as usual. Outside of the main thread no signal
    can be caught. Where there are several processes, jax's preemption service catches SIGTERM from
    `jax.distributed.initialize` on, and brings all of them to stop after the same step.
    """

    def __init__(self) -> None:
        """Nothing is caught before `with`."""
        self.asked = False
        self._together = jax.process_count() > 1
        self._asked, self._reached = 0, False
        self._at_once = False
        self._before: dict[int, object] = {}

    def after_step(self) -> bool:
        """Whether to stop now; every process must ask once after every step, also one undone."""
        if not self._together:
            return self.asked
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._asked += 1  # steps themselves may go back
        self._reached |= reached_preemption_sync_point(self._asked)
        return self._reached

    def at_once(self) -> None:
        """From here on a notice ends what is going on by `Stopped`, also one that has come.

        Of one process only: several must stay together.
        """
        self._at_once = not self._together
        if self._at_once and self.asked:
            raise Stopped

    def __enter__(self) -> "Stop":
        """Start to catch."""
        if threading.current_thread() is threading.main_thread():
            notices = (signal.SIGUSR1, signal.SIGINT)
            for number in notices if self._together else (signal.SIGTERM, *notices):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._at_once:
            raise Stopped

    def __exit__(self, *error: object) -> None:
        """Back to what was caught before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
