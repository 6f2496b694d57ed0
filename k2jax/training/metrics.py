"""The metrics of a run: `metrics.jsonl` and a plot of it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
