"""Detect bad steps (spikes, non-finite values) from recent losses. No jax here.

What a run decides follows from its losses alone, so that every host decides alike, and from what
a checkpoint holds (`Health.state`), so that a resumed run decides as the uninterrupted one.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from k2jax.config import LEAST_WINDOW, HealthConfig

TO_SIGMA = 1.4826  # of a Gaussian's median absolute deviation
LEAST_DEVIATION = 0.005  # of the median: losses that hardly differ make no spike of the next


def spike_threshold(losses: Iterable[float], spike: float) -> float:
    """Return the loss above which the next one is a spike: median + `spike` deviations.

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

        A resumed run may have been helped meanwhile, so skipped steps in a row start at 0.
        """
        saved = saved or {}
        self.config = config
        self.losses: deque[float] = deque(saved.get("losses", ()), config.window)
        self.skipped: int = saved.get("skipped", 0)
        self.spikes: int = saved.get("spikes", 0)
        self.skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-able."""
        return {"losses": list(self.losses), "skipped": self.skipped, "spikes": self.spikes}

    @property
    def threshold(self) -> float:
        """Return the loss above which the next one is a spike."""
        return spike_threshold(self.losses, self.config.spike)

    @property
    def ceiling(self) -> float:
        """Return the loss above which the next step is refused."""
        return self.threshold if self.config.on_spike == "skip" else math.inf

    def judge(self, loss: float, skipped: bool, targets: float = 1.0) -> str:
        """Take in a step: "", "spike", "skipped" (refused, a spike or not finite) or "untaught".

        The loss of a refused step is not taken into the window. A batch without targets teaches
        nothing; that is no fault of the run, however many come in a row.
        """
        if not targets:
            self.skipped += 1
            return "untaught"
        sick = loss > self.threshold
        self.spikes += sick
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return "skipped"
        self.skipped_in_a_row = 0
        self.losses.append(loss)
        return "spike" if sick else ""

    @property
    def should_abort(self) -> bool:
        """Whether so many steps were skipped in a row that the run should end."""
        return self.skipped_in_a_row >= self.config.patience
