"""What a run says of itself: `metrics.jsonl`, a progress bar or plain lines, and a plot."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2jax.config import RunConfig
from k2jax.runtime.files import Lines, write_atomic
from k2jax.runtime.memory import resident


class Metrics:
    """Appends one JSON line a step. Lines of steps after the one resumed from are dropped."""

    def __init__(
        self,
        path: Path | None,
        start: int,
        schedule: Callable[[int], Any],
        say: Callable[[str], None],
    ):
        """Keep the lines up to step `start`; `schedule` gives each step's learning rate.

        `path` None: write nothing (a process that another one writes for).
        """
        self.schedule = schedule
        self.file: Lines | None = None
        if path is None:
            return
        # A bad disk's bytes must not keep a run from going on: such lines are left out.
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= start] if start else []
        write_atomic(path, "".join(f"{line}\n" for line in kept))
        self.file = Lines(path, say)

    def __enter__(self) -> "Metrics":
        """Ready to write."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        if self.file:
            self.file.close()

    def write(self, step: int, values: dict[str, Any], applied: int) -> dict[str, Any]:
        """One line, which is returned: the step, its learning rate, and `values`.

        `applied`: steps before this one that moved the weights; the schedule counts only those.
        """
        values = {"step": step, "learning_rate": float(self.schedule(applied)), **values}
        line = {name: _short(value) for name, value in values.items()}
        if self.file:
            self.file.write(json.dumps(line))
        return line


def _short(value: Any) -> Any:
    """Floats, also those of a list, in as many digits as float32 has; None if not finite."""
    if isinstance(value, list):
        return [_short(part) for part in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None  # JSON has no NaN


@dataclasses.dataclass(frozen=True)
class Speed:
    """Turns seconds into rates."""

    tokens: int  # of a step
    flops: float  # of a token: three forward passes
    peak: float  # operations a second of all devices; 0: not known

    def of(self, seconds: float, waited: float) -> dict[str, float]:
        """Metrics of a step that took `seconds`, after its input was waited for."""
        rate = self.tokens / (seconds + waited)
        found = {"seconds": seconds, "input_seconds": waited, "tokens_per_second": rate}
        found["flops_per_second"] = rate * self.flops
        if self.peak:
            found["mfu"] = rate * self.flops / self.peak
        if memory := resident():
            found["host_bytes"] = memory
        return found


def _step(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):  # a killed process's last line may be cut off
        return float("inf")
    return step if isinstance(step, int) else float("inf")


class Progress:
    """A bar where there is a terminal, else a plain line every `log_every` steps."""

    def __init__(self, run: RunConfig, start: int, say: Callable[[str], None], began: float):
        """`began`: when the command started, on `time.perf_counter`'s clock."""
        self.run, self.start, self.say, self.began = run, start, say, began
        self.tokens = run.data.rows * run.data.context
        self.bar: Any = None
        self.live: Any = None
        self.heldout, self.measured = "", 0
        self.newest: dict[str, Any] = {}
        self.first = 0.0

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if sys.stdout.isatty():
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                MofNCompleteColumn(), BarColumn(None), TextColumn("{task.description}"),
                TimeRemainingColumn(), expand=True,
            )  # fmt: skip
            self.live = Live(self.bar, refresh_per_second=4)
            self.live.start()
            self.task = self.bar.add_task("", total=self.run.train.steps, completed=self.start)
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        if self.live is not None:
            self.live.stop()

    def show(self, step: int, values: dict[str, Any], skipped: int = 0, spikes: int = 0) -> None:
        """Tell of one finished step, and of how many were skipped or spikes so far."""
        now = time.perf_counter()
        if step == self.start + 1:
            self.first = now
            self.say(f"first step after {now - self.began:.1f} s")
        if "heldout_loss" in values:
            self.measured = step
            self.heldout = (
                f", held out {values['heldout_loss']:.4f}"
                f" ({values['heldout_bits_per_byte']:.3f} bits per byte)"
            )
        speed = self.tokens * max(step - self.start - 1, 1) / max(now - self.first, 1e-9)
        speed = speed if step > self.start + 1 else self.tokens / values["seconds"]
        when = f" at step {self.measured}" if self.measured not in (0, step) else ""
        text = f"loss {values['loss']:.4f}{self.heldout}{when}, {speed:,.0f} tokens/s"
        if self.bar is not None:
            from rich.console import Group

            from k2jax.training.dashboard import table

            self.newest |= values  # the held-out loss is measured seldom
            self.bar.update(self.task, completed=step, description=text)
            self.live.update(Group(self.bar, table(self.newest, skipped, spikes)))
        elif step % self.run.train.log_every == 0 or step == self.run.train.steps:
            self.say(f"step {step}/{self.run.train.steps}: {text}")


def plot(metrics: Path, picture: Path, title: str) -> None:
    """Draw a run's losses, logits and expert load.

    Args:
        metrics: a `metrics.jsonl`.
        picture: the PNG to write.
        title: above it.
    """
    from matplotlib.figure import Figure  # pyplot would switch a notebook's own plots

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    def draw(axes: Any, name: str, label: str, **style: Any) -> None:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    draw(left, "loss", "training", linewidth=1)
    draw(left, "heldout_loss", "held out", marker="o")
    left.set_ylabel("nats per token")
    left.legend()
    draw(middle, "logit_max", "largest attention logit", linewidth=1)
    middle.set_ylabel("largest attention logit")
    draw(right, "load_max", "largest expert load", linewidth=1)
    right.set_ylabel("busiest expert over the mean")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(picture, dpi=110)
