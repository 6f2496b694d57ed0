"""The metrics of a run: from the devices to `metrics.jsonl`, and a plot of that file."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k2jax.runtime.files import Lines, open_atomic

METRICS = "metrics.jsonl"
LOADS = "expert_load"  # a metric of layers x experts numbers: most of a line


def metrics_to_host(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Fetch a step's metrics: floats, lists, and the expert load as whole numbers."""
    host = {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}
    if LOADS in host:
        host[LOADS] = host[LOADS].astype(int)
    return {name: value.tolist() for name, value in host.items()}


def to_line(step: int, metrics: Mapping[str, Any], loads: bool = True) -> dict[str, Any]:
    """Return a step's line of `metrics.jsonl`: floats as float32 has them, None if not finite.

    Args:
        step: its number.
        metrics: on the host.
        loads: whether to write the load of each expert.
    """
    written = {name: value for name, value in metrics.items() if loads or name != LOADS}
    return {"step": step} | {name: _shorten(value) for name, value in written.items()}


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
        with open_atomic(path) as kept:
            for line in _read_lines(path) if start and path.exists() else ():
                if _step(line) <= start:
                    kept.write(line.encode() + b"\n")
        self.file = Lines(path, say)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write what `to_line` made."""
        self.file.write(json.dumps(line))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _read_lines(path: Path) -> Iterator[str]:
    """Yield lines one by one: the file of a long run would fill a host's memory."""
    # A bad disk's bytes must not keep a run from resuming: such lines are left out.
    with path.open(errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def _step(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):  # a killed process's last line may be cut off
        return float("inf")
    return step if isinstance(step, int) else float("inf")


def read_metrics(out: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's `metrics.jsonl`."""
    for line in _read_lines(Path(out) / METRICS):
        yield json.loads(line)


def plot_metrics(metrics: Path, picture: Path, title: str) -> None:
    """Draw a run's losses, logits and expert load.

    Args:
        metrics: a `metrics.jsonl`.
        picture: the PNG to write.
        title: above it.
    """
    from matplotlib.figure import Figure  # pyplot would switch a notebook's own plots

    names = ("step", "loss", "heldout_loss", "logit_max", "load_max")
    lines = [{name: line.get(name) for name in names} for line in read_metrics(metrics.parent)]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    def draw(axes: Any, name: str, label: str, **style: Any) -> None:
        points = [(line["step"], line[name]) for line in lines if line[name] is not None]
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
