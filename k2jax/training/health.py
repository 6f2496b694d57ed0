"""Sick steps: told from the losses before them, and what a run does then. No jax here.

What a run decides follows from its losses alone, so that every host decides alike, and from what
a checkpoint holds (`Health.state`), so that a resumed run decides as the uninterrupted one.
"""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from k2jax.config import LEAST_WINDOW, HealthConfig
from k2jax.runtime.files import Lines

TO_SIGMA = 1.4826  # of a Gaussian's median absolute deviation
LEAST_DEVIATION = 0.005  # of the median: losses that hardly differ make no spike of the next


def threshold(losses: Iterable[float], spike: float) -> float:
    """Loss above which the next one is a spike: median + `spike` deviations.

    The deviation is 1.4826 times the median absolute one, which a few wild losses do not move,
    and at least half a percent of the median. Infinite for fewer than 20 losses, or `spike` 0.
    """
    losses = list(losses)
    if not spike or len(losses) < LEAST_WINDOW:
        return math.inf
    middle = statistics.median(losses)
    spread = TO_SIGMA * statistics.median(abs(loss - middle) for loss in losses)
    return middle + spike * max(spread, LEAST_DEVIATION * abs(middle))


class Health:
    """Counts and judges the steps of a run."""

    def __init__(self, config: HealthConfig, saved: Mapping[str, Any] | None = None):
        """Start anew, or from a checkpoint's `state`.

        A run that goes on may have been helped meanwhile, so skipped steps in a row start at 0.
        """
        saved = saved or {}
        self.config = config
        self.losses: deque[float] = deque(saved.get("losses", ()), config.window)
        self.skipped: int = saved.get("skipped", 0)
        self.spikes: int = saved.get("spikes", 0)
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"losses": list(self.losses), "skipped": self.skipped, "spikes": self.spikes}

    @property
    def threshold(self) -> float:
        """Loss above which the next one is a spike."""
        return threshold(self.losses, self.config.spike)

    @property
    def ceiling(self) -> float:
        """Loss above which the next step is refused."""
        return self.threshold if self.config.on_spike == "skip" else math.inf

    def judge(self, loss: float, skipped: bool) -> str:
        """Take in a step: "", "spike" or "skipped" (refused, a spike or not finite).

        The loss of a refused step is not taken into the window.
        """
        sick = loss > self.threshold
        self.spikes += sick
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            return "skipped"
        self.in_a_row = 0
        self.losses.append(loss)
        return "spike" if sick else ""

    @property
    def lost(self) -> bool:
        """Whether so many steps were skipped in a row that the run should end."""
        return self.in_a_row >= self.config.patience


class Order:
    """Which batch a step takes: all in turn, but those left out."""

    def __init__(self, left_out: Iterable[int] = ()):
        """Leave out the batches with these indices."""
        self.left_out = sorted(set(left_out))

    def index(self, step: int) -> int:
        """The batch of `step` (0, 1, ...): the step-th of those not left out."""
        for out in self.left_out:
            step += out <= step
        return step

    def without(self, first: int, last: int) -> "Order":
        """This order without the batches of steps `first` to `last` - 1."""
        return Order([*self.left_out, *map(self.index, range(first, last))])


class Events:
    """Appends to `events.jsonl`, one JSON line an event: `step`, `event`, `time`, and its own."""

    def __init__(self, path: Path | None, say: Callable[[str], None] = print):
        """`path` None: tell nobody (a process that does not write). `say`: when it cannot."""
        self.path, self.say = path, say
        self.lines: Lines | None = None

    def add(self, step: int, event: str, **values: Any) -> None:
        """Write one, at once. A loss that is not finite is written as null."""
        if self.path is None:
            return
        fields = {"step": step, "event": event, "time": round(time.time(), 3)}
        for name, value in values.items():
            sick = isinstance(value, float) and not math.isfinite(value)
            fields[name] = None if sick else value
        if self.lines is None:
            self.lines = Lines(self.path, self.say)
        self.lines.write(json.dumps(fields))
