"""What a run says of itself: `metrics.jsonl`, a progress bar or plain lines, and a plot."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2jax.config import RunConfig
from k2jax.files import Lines, replace


class Metrics:
    """Appends one JSON line a step. Lines of steps after the one resumed from are dropped."""

    def __init__(
        self, path: Path, start: int, schedule: Callable[[int], Any], say: Callable[[str], None]
    ):
        """Keep the lines up to step `start`; `schedule` gives each step's learning rate."""
        self.schedule = schedule
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= start] if start else []
        replace(path, "".join(f"{line}\n" for line in kept))
        self.file = Lines(path, say)

    def __enter__(self) -> "Metrics":
        """Ready to write."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.file.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line: the step, its learning rate, and `values`."""
        values = {"step": step, "learning_rate": float(self.schedule(step - 1)), **values}
        self.file.write(json.dumps({name: _short(value) for name, value in values.items()}))


def _short(value: Any) -> Any:
    """Floats, also those of a list, in as many digits as float32 has."""
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed process may be cut off
        return float("inf")


class Progress:
    """A bar where there is a terminal, else a plain line every `log_every` steps."""

    def __init__(self, run: RunConfig, start: int, say: Callable[[str], None], began: float):
        """`began`: when the command started, on `time.perf_counter`'s clock."""
        self.run, self.start, self.say, self.began = run, start, say, began
        self.tokens = run.data.rows * run.data.context
        self.bar: Any = None
        self.heldout = ""
        self.first = 0.0

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                MofNCompleteColumn(), BarColumn(None), TextColumn("{task.description}"),
                TimeRemainingColumn(), expand=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=self.run.train.steps, completed=self.start)
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, values: dict[str, Any]) -> None:
        """Tell of one finished step."""
        now = time.perf_counter()
        if step == self.start + 1:
            self.first = now
            self.say(f"first step after {now - self.began:.1f} s")
        if "heldout_loss" in values:
            self.heldout = (
                f", held out {values['heldout_loss']:.4f}"
                f" ({values['heldout_bits_per_byte']:.3f} bits per byte)"
            )
        speed = self.tokens * max(step - self.start - 1, 1) / max(now - self.first, 1e-9)
        speed = speed if step > self.start + 1 else self.tokens / values["seconds"]
        text = f"loss {values['loss']:.4f}{self.heldout}, {speed:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
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
        points = [(line["step"], line[name]) for line in lines if name in line]
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
