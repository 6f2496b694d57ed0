"""The metrics of a run: from the devices to `metrics.jsonl`, and a plot of that file."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k2jax.runtime.files import Lines, write_atomic

METRICS = "metrics.jsonl"


def metrics_to_host(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Fetch a step's metrics: floats, lists, and the expert load as whole numbers."""
    host = {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}
    if "expert_load" in host:
        host["expert_load"] = host["expert_load"].astype(int)
    return {name: value.tolist() for name, value in host.items()}


def to_line(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's line of `metrics.jsonl`: floats as float32 has them, None if not finite."""
    return {"step": step} | {name: _shorten(value) for name, value in metrics.items()}


def _shorten(value: Any) -> Any:
    if isinstance(value, list):
        return [_shorten(part) for part in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None  # JSON has no NaN


class MetricsFile:
    """Appends one JSON line a step. Lines of steps after the one resumed from are dropped."""

    def __init__(self, path: Path, start: int, say: Callable[[str], None]):
        """Keep the lines up to step `start`; `say` is called when the file cannot be written."""
        # A bad disk's bytes must not keep a run from resuming: such lines are left out.
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= start] if start else []
        write_atomic(path, "".join(f"{line}\n" for line in kept))
        self.file = Lines(path, say)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write what `to_line` made."""
        self.file.write(json.dumps(line))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _step(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):  # a killed process's last line may be cut off
        return float("inf")
    return step if isinstance(step, int) else float("inf")


def read_metrics(out: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's `metrics.jsonl`."""
    for line in (Path(out) / METRICS).read_text().splitlines():
        yield json.loads(line)


def plot_metrics(metrics: Path, picture: Path, title: str) -> None:
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
