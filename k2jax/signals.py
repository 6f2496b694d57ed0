"""Stop a run between two steps when the machine asks for it."""

import signal
import threading
from types import FrameType


class Stop:
    """While open, SIGTERM, SIGUSR1 and a first Ctrl-C set `asked` instead of ending the process.

    Clusters announce the end with SIGTERM, SLURM with what its `--signal` says, often SIGUSR1;
    either may come again. A second Ctrl-C interrupts as usual. Outside of the main thread no signal
    can be caught, and `asked` stays false.
    """

    def __init__(self) -> None:
        """Nothing is caught before `with`."""
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        """Start to catch."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        """Back to what was caught before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
