"""What happens around each step of `fit`: the protocol, and the callbacks of a training run.

Only the order in `loop.py` connects them: one may add to a step's metrics what a later one reads.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.config import ConfigError, RunConfig
from k2jax.runtime.signals import StopSignals
from k2jax.training import trackers
from k2jax.training.dashboard import Dashboard
from k2jax.training.metrics import MetricsFile, to_line
from k2jax.training.profiling import Profiler, Speed
from k2jax.training.recovery import Recovery
from k2jax.training.saver import Saver


@dataclasses.dataclass(frozen=True)
class Continue:
    """Take the next step."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Take no further step; this one counts, and every callback sees it."""


@dataclasses.dataclass(frozen=True)
class RewindTo:
    """Undo the steps after `step`; no further callback sees the one just taken."""

    step: int


Action = Continue | Stop | RewindTo


class Callback:
    """Hooks of `fit`, none of which does anything here; override those that you need.

    They are called in this order: `begin`, then `before_step` and `on_step` for every step, `end`
    unless an error ended the run, and always `close`. A rewind is `close` and `begin` once more.
    """

    def begin(self, step: int) -> None:
        """Prepare to continue after `step`; 0: a new run."""

    def before_step(self, step: int, batch: Any) -> None:
        """Act before `step` is taken with `batch`; the first step is 1."""

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Act on a finished step, and decide how to continue.

        Args:
            step: its number from 1.
            state: after the step; the next step donates it.
            metrics: on the host; what is added here is seen by the callbacks after this one.
        """
        return Continue()

    def end(self, step: int, state: Any) -> None:
        """Complete what was begun, after the last step or a `Stop`."""

    def close(self) -> None:
        """Release what `begin` opened."""


class Profile(Callback):
    """Traces the steps of `train.profile`."""

    def __init__(self, profiler: Profiler):
        self.profiler = profiler

    def before_step(self, step: int, batch: Any) -> None:
        """Start or end the trace."""
        self.profiler.before_step(step)

    def close(self) -> None:
        """End a trace that the run ended in."""
        self.profiler.stop()


class MeasureSpeed(Callback):
    """Adds rates, and what the save after the step before took."""

    def __init__(self, speed: Speed, saver: Saver):
        self.speed, self.saver = speed, saver

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Add them to the metrics."""
        metrics |= self.speed.compute_rates(metrics["seconds"], metrics["input_seconds"])
        metrics |= self.saver.pop_metrics()
        return Continue()


class Recover(Callback):
    """Judges every step, adds its learning rate, and rewinds where the run is to."""

    def __init__(self, recovery: Recovery, saver: Saver, schedule: Callable[[int], Any]):
        self.recovery, self.saver, self.schedule = recovery, saver, schedule

    def begin(self, step: int) -> None:
        """Take over what the checkpoint knows of the run's health."""
        self.recovery.begin(self.saver.checkpoints.meta(step) if step else {})

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Judge the step."""
        verdict = self.recovery.judge(step, metrics)
        target = self.recovery.maybe_rewind(step, verdict, self.saver)
        if target is not None:
            return RewindTo(target)
        # The schedule counts only steps that moved the weights.
        applied = self.recovery.count_applied(step, verdict)
        metrics["learning_rate"] = float(self.schedule(applied))
        return Continue()


class Abort(Callback):
    """Ends a run that skips one step after another, in one line; comes after what writes."""

    def __init__(self, recovery: Recovery):
        self.recovery = recovery
        self.batch: Mapping[str, np.ndarray] = {}

    def before_step(self, step: int, batch: Any) -> None:
        """Keep the batch: it is written if the run ends here."""
        self.batch = batch

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """End the run if there is no hope.

        Raises:
            ConfigError: so many steps were skipped in a row.
        """
        if self.recovery.health.should_abort:
            loss = metrics["loss"]
            raise ConfigError(self.recovery.describe_failure(step, loss, state.params, self.batch))
        return Continue()


class ScoreHeldout(Callback):
    """Adds the held-out loss every `every` steps and after the last one."""

    def __init__(self, score: Callable[[Any], dict[str, float]], every: int, last: int):
        self.score, self.every, self.last = score, every, last

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Score the weights when it is due."""
        if step == self.last or is_multiple(step, self.every):
            metrics |= self.score(state.params)
        return Continue()


class CompileEarly(Callback):
    """Starts to compile the evaluation after the first step, which it would have slowed."""

    def __init__(self, start: Callable[[], Any]):
        self.start = start
        self.first = 1

    def begin(self, step: int) -> None:
        """Note which step is the first."""
        self.first = step + 1

    def before_step(self, step: int, batch: Any) -> None:
        """Start before the second step: a run that stops after the first needs no evaluation."""
        if step > self.first:
            self.start()


class WriteMetrics(Callback):
    """Writes a line of `metrics.jsonl` for each step; those after a rewind's target are dropped."""

    def __init__(self, path: Path | None, say: Callable[[str], None], loads_every: int = 1):
        """`path`: None: nothing is written; `loads_every`: steps between experts' loads."""
        self.path, self.say, self.loads_every = path, say, loads_every
        self.file: MetricsFile | None = None

    def begin(self, step: int) -> None:
        """Open the file."""
        if self.path is not None:
            self.file = MetricsFile(self.path, step, self.say)

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Write the line."""
        if self.file:
            self.file.write(to_line(step, metrics, is_multiple(step, self.loads_every)))
        return Continue()

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()


class ShowProgress(Callback):
    """Shows the newest metrics."""

    def __init__(self, make: Callable[[int], Dashboard], recovery: Recovery):
        """`make`: of the step that the run begins with."""
        self.make, self.recovery = make, recovery
        self.dashboard: Dashboard | None = None

    def begin(self, step: int) -> None:
        """Show the bar."""
        self.dashboard = self.make(step).__enter__()

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Show the step."""
        health = self.recovery.health
        if self.dashboard:
            self.dashboard.show(step, metrics, health.skipped, health.spikes)
        return Continue()

    def close(self) -> None:
        """Remove the bar."""
        if self.dashboard:
            self.dashboard.__exit__(None, None, None)


class Track(Callback):
    """Sends the metrics to TensorBoard or Weights & Biases."""

    def __init__(self, run: RunConfig, out: Path):
        self.run, self.out = run, out
        self.stack = contextlib.ExitStack()
        self.track: Callable[[dict[str, Any]], None] = lambda line: None

    def begin(self, step: int) -> None:
        """Open them; a resumed run continues its curves."""
        self.track = self.stack.enter_context(trackers.open_trackers(self.run, self.out, step))

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Send a line."""
        self.track(to_line(step, metrics))
        return Continue()

    def close(self) -> None:
        """Close them."""
        self.stack.close()


class StopOnSignal(Callback):
    """Stops after the step in which the machine asked for it."""

    def __init__(self, signals: StopSignals):
        self.signals = signals

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Ask; every process does so after the same steps."""
        return Stop() if self.signals.should_stop() else Continue()


class Save(Callback):
    """Saves every `every` steps and at the end, the last one for certain."""

    def __init__(
        self,
        saver: Saver,
        every: int,
        describe: Callable[[int], dict[str, Any]],
        parts: Callable[[Any], dict[str, Any]] = lambda state: state._asdict(),
    ):
        """`describe`: what a checkpoint of a step keeps beside the `parts` of the state."""
        self.saver, self.every, self.describe, self.parts = saver, every, describe, parts
        self.newest = 0

    def begin(self, step: int) -> None:
        """Note which step is saved already."""
        self.newest = step

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        """Save when it is due."""
        if is_multiple(step, self.every):
            self._save(step, state)
        return Continue()

    def end(self, step: int, state: Any) -> None:
        """Save the last step, and wait until it is written."""
        if step != self.newest:
            self._save(step, state)
        self.saver.finish(self.parts(state))

    def _save(self, step: int, state: Any) -> None:
        self.saver.save(step, self.parts(state), self.describe(step))
        self.newest = step


def is_multiple(step: int, every: int) -> bool:
    """Whether something is due that happens every `every` steps; 0: never."""
    return bool(every) and step % every == 0
