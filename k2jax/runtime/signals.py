"""Stop a run between two steps when the machine asks for it."""

import os
import signal
import threading
from types import FrameType

import jax


class Interrupted(BaseException):
    """A stop was requested, and nothing is left to save.

    As KeyboardInterrupt it is no `Exception`, which jax, for one, catches around its caches.
    """


class StopSignals:
    """While open, SIGTERM, SIGUSR1 and a first Ctrl-C request a stop instead of ending the process.

    Clusters announce the end with SIGTERM, SLURM with what its `--signal` says, often SIGUSR1;
    either may come again. A second Ctrl-C interrupts as usual. Outside of the main thread no signal
    can be caught. Where there are several processes, jax's preemption service catches SIGTERM from
    `jax.distributed.initialize` on, and brings all of them to stop after the same step.
    """

    def __init__(self) -> None:
        """Nothing is caught before `with`."""
        self.requested = False
        self._several = jax.process_count() > 1
        self._asked, self._reached = 0, False
        self._interrupts = False
        self._before: dict[int, object] = {}

    def should_stop(self) -> bool:
        """Whether to stop now; every process must ask after the same steps."""
        if not self._several:
            return self.requested
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._asked += 1  # not the step, which may go back
        self._reached |= reached_preemption_sync_point(self._asked)
        return self._reached

    def interrupt_from_now_on(self) -> None:
        """Let a signal, also one that has come, raise `Interrupted` wherever the process is.

        Of one process only: several must stay together.
        """
        self._interrupts = not self._several
        if self._interrupts and self.requested:
            raise Interrupted

    def __enter__(self) -> "StopSignals":
        """Start to catch."""
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGUSR1, signal.SIGINT)
            for number in caught if self._several else (signal.SIGTERM, *caught):
                self._before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._interrupts:
            raise Interrupted

    def __exit__(self, *error: object) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
