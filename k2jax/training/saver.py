"""When a run saves, and what happens when it cannot."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from k2jax import cluster
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError

NOTABLE = 1.0  # seconds that a save may wait for the one before without a word


class Saver:
    """A failed save is a warning, and the next one is tried as planned; the last must succeed."""

    def __init__(self, checkpoints: Checkpoints, say: Callable[[str], None]):
        """Report failures and waits to `say`."""
        self.checkpoints, self.say = checkpoints, say
        self.last: tuple[int, Mapping[str, Any]] | None = None
        self.seconds: float | None = None

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Begin to write a step; a failure, of this save or the one before, is reported."""
        began = time.perf_counter()
        self.settle()
        if (waited := time.perf_counter() - began) > NOTABLE:
            self.say(
                f"step {step} waited {waited:.1f} s until the checkpoint before it was written;"
                " a larger train.save_every waits less"
            )
        self._try(functools.partial(self.checkpoints.save, step, state, meta))
        self.last = step, meta
        self.seconds = time.perf_counter() - began

    def settle(self) -> None:
        """Wait for the save in progress; its failure is reported.

        Raises:
            ConfigError: it failed here, and there are other processes. They do not know, and wait
                for this one's share; the run ends, and is resumed from the checkpoint before.
        """
        if cluster.current().count > 1:
            self.checkpoints.wait()
        else:
            self._try(self.checkpoints.wait)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints after `step`, to which the run is rewound."""
        self.checkpoints.drop_after(step)
        self.last = None

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ConfigError as error:
            self.say(f"warning: {error}; the next save tries again")

    def finish(self, state: Mapping[str, Any]) -> None:
        """Wait for the last save; if it failed, write `state`, which it was to hold, once more.

        Raises:
            ConfigError: that failed too; the line says what is complete.
        """
        if self.last is None:
            return
        self.settle()
        if not self.checkpoints.has(self.last[0]):
            self.checkpoints.save(self.last[0], state, self.last[1])
            self.checkpoints.wait()

    def pop_metrics(self) -> dict[str, float]:
        """Return the metric of the save after the step before, once; empty if there was none."""
        seconds, self.seconds = self.seconds, None
        return {} if seconds is None else {"save_seconds": seconds}
