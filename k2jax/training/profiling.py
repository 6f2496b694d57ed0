"""What a step costs: rates, the wait for its input, and a trace of some steps."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from k2jax.config import ConfigError, RunConfig, one_line
from k2jax.params.counts import count_flops
from k2jax.runtime.hardware import peak_of
from k2jax.runtime.memory import resident
from k2jax.training.events import Events

PROFILE = "profile"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Turns the seconds of a step into rates."""

    tokens: int  # of a step
    flops: float  # of a token: three forward passes
    peak: float  # operations a second of all devices; 0: not known

    def compute_rates(self, seconds: float, waited: float) -> dict[str, float]:
        """Return the metrics of a step that took `seconds`, after `waited` for its input."""
        rate = self.tokens / (seconds + waited)
        metrics = {"tokens_per_second": rate, "flops_per_second": rate * self.flops}
        if self.peak:
            metrics["mfu"] = rate * self.flops / self.peak
        if memory := resident():
            metrics["host_bytes"] = memory
        return metrics


def make_speed(run: RunConfig) -> Speed:
    """Describe how a run's seconds become rates on the devices of this process."""
    peak = peak_of(jax.devices()[0].device_kind) * run.mesh.devices
    work = count_flops(run.model, run.data.context)
    return Speed(run.data.rows * run.data.context, work["train_flops_per_token"], peak)


def time_waits(items: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Yield each item with the seconds that it was waited for."""
    iterator = iter(items)
    while True:
        began = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - began


class Profiler:
    """Takes the trace of `train.profile` into the run's folder."""

    def __init__(self, run: RunConfig, out: Path, events: Events):
        """Start nothing yet."""
        self.window, self.out, self.events = run.train.profiled, out, events
        self.traced: list[int] = []

    def before_step(self, step: int) -> None:
        """Start the trace before the first step of the window, and end it after the last one.

        Raises:
            ConfigError: another trace is being taken in this process.
        """
        if self.traced and step not in self.window:
            self.stop()
        if not self.traced and step in self.window:
            try:
                jax.profiler.start_trace(self.out / PROFILE)
            except Exception as error:
                raise ConfigError(f"train.profile cannot start: {one_line(error)}") from error
        if step in self.window:
            self.traced.append(step)

    def stop(self) -> None:
        """End a trace that is being taken."""
        if self.traced:
            jax.profiler.stop_trace()
            first, last = self.traced[0], self.traced[-1]
            self.events.add(last, "profiled", file=PROFILE, steps=[first, last])
            self.traced.clear()
