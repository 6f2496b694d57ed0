"""What a run's folder recorded, thinned out to what a plot can show."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError, RunConfig, from_json

POINTS = 500  # stretches of steps; each keeps its lowest and highest value
Point = tuple[float, float]


@dataclasses.dataclass
class RunRecord:
    """A run as it is recorded."""

    name: str
    folder: Path
    config: RunConfig | None  # None: of a version whose config this one does not know
    versions: dict[str, str]
    series: dict[str, list[Point]]  # by key: (step, value), oldest first
    layers: dict[str, list[list[float]]]  # by key: per stretch, the largest value of each layer
    last: dict[str, Any]  # the newest value of each key
    lines: int
    steps: tuple[int, int]  # the first and the last
    events: list[dict[str, Any]]
    age: float  # seconds since the last line


@dataclasses.dataclass
class _Stretch:
    """Lowest and highest value of one key over neighbouring steps."""

    low: Point
    high: Point

    def add(self, step: float, value: float) -> None:
        if value < self.low[1]:
            self.low = (step, value)
        if value > self.high[1]:
            self.high = (step, value)


def read(folder: Path) -> RunRecord:
    """Everything that the page of a run needs.

    Raises:
        ConfigError: no such folder, or nothing recorded in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}")
    metrics = folder / "metrics.jsonl"
    try:
        count = sum(1 for _ in _lines(metrics))
    except OSError:
        raise ConfigError(f"{folder} has no metrics.jsonl; is it the folder of a run?") from None
    if not count:
        raise ConfigError(f"{metrics} has no steps yet")
    saved = _object(folder / "config.json")
    thin = _Thinned(max(1, math.ceil(count / POINTS)))
    for number, line in enumerate(_lines(metrics)):
        thin.add(number, line)
    config = _config(saved)
    series = {name: _points(stretches) for name, stretches in thin.series.items()}
    _fill_in(series, thin.last, config)
    return RunRecord(
        name=str(saved.get("name") or folder.resolve().name),
        folder=folder,
        config=config,
        versions=_versions(folder, saved),
        series=series,
        layers=thin.layers,
        last=thin.last,
        lines=count,
        steps=(thin.first, thin.last["step"]),
        events=list(_lines(folder / "events.jsonl")) if (folder / "events.jsonl").exists() else [],
        age=time.time() - metrics.stat().st_mtime,
    )


class _Thinned:
    """Takes the lines of a run one by one and keeps a bounded number of values."""

    def __init__(self, each: int):
        self.each, self.first = each, 0
        self.series: dict[str, dict[int, _Stretch]] = {}
        self.layers: dict[str, list[list[float]]] = {}
        self.last: dict[str, Any] = {}

    def add(self, number: int, line: dict[str, Any]) -> None:
        self.first = self.first or line["step"]
        self.last |= {
            name: value for name, value in line.items() if not isinstance(value, str | None)
        }
        at = number // self.each
        for name, value in line.items():
            if isinstance(value, list):
                if name.endswith("_layers"):
                    self._add_layers(name, at, value)
            elif isinstance(value, int | float) and math.isfinite(value):
                point = (line["step"], value)
                stretch = self.series.setdefault(name, {}).setdefault(at, _Stretch(point, point))
                stretch.add(*point)

    def _add_layers(self, name: str, at: int, values: list[float | None]) -> None:
        rows = self.layers.setdefault(name, [])
        known = [math.nan if value is None else value for value in values]
        while len(rows) <= at:
            rows.append(known)
        rows[at] = [
            b if math.isnan(a) else max(a, b) for a, b in zip(rows[at], known, strict=False)
        ]


def _points(stretches: dict[int, _Stretch]) -> list[Point]:
    found = []
    for stretch in stretches.values():
        found += sorted({stretch.low, stretch.high})
    return found


def _fill_in(series: dict[str, list[Point]], last: dict[str, Any], run: RunConfig | None) -> None:
    """What older runs did not write but what follows from what they did."""
    if "tokens_per_second" not in series and run and "seconds" in series:
        tokens = run.data.rows * run.data.context
        rates = [(step, tokens / s) for step, s in series["seconds"] if s > 0]
        if rates:
            series["tokens_per_second"] = rates
            last["tokens_per_second"] = rates[-1][1]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects with a step, one a line; a line that is cut off or none is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _config(saved: dict[str, Any]) -> RunConfig | None:
    try:
        return from_json({name: saved[name] for name in saved if name != "versions"})
    except (ConfigError, TypeError, KeyError):
        return None


def _versions(folder: Path, saved: dict[str, Any]) -> dict[str, str]:
    """Of packages, of the last start in `run.json`; old runs may have them in `config.json`."""
    try:
        last = json.loads((folder / "run.json").read_text())[-1]
        found = last["versions"] | {"device": last["device"]}
    except (OSError, ValueError, LookupError, TypeError):
        found = saved.get("versions", {})
    return {str(name): str(value) for name, value in found.items()}
