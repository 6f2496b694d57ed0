"""Counts of what the server did, as text that Prometheus reads (exposition format 0.0.4)."""

import bisect
import dataclasses
import threading
from collections import Counter
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "k2jax_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# Gauges whose names end as counters' do.
LEVELS = ("pages_total",)


class Histogram:
    """How many values were at most each bound."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """Its text."""
        out, running = [f"# TYPE {name} histogram"], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            running += count
            out.append(f'{name}_bucket{{le="{bound}"}} {running}')
        return [*out, f"{name}_sum {self._sum:.6f}", f"{name}_count {running}"]


class Meters:
    """What the server counts besides the engine; safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._histograms = {
            "time_to_first_token_seconds": Histogram(),
            "request_duration_seconds": Histogram(),
        }
        self.gone = 0

    def count_response(self, path: str, status: int) -> None:
        """Count a response; `path` is a route's, so that there are few."""
        with self._lock:
            self._requests[path, status] += 1

    def count_gone(self) -> None:
        """Count a client that left before its answer was whole."""
        with self._lock:
            self.gone += 1

    def observe(self, name: str, seconds: float) -> None:
        """Put a duration into a histogram."""
        with self._lock:
            self._histograms[name].add(seconds)

    def render(self, stats: Any) -> str:
        """The text.

        Args:
            stats: the engine's, a dataclass; its numbers are reported by their names.
        """
        lines = []
        for field in dataclasses.fields(stats):
            value = getattr(stats, field.name)
            if isinstance(value, int | float):
                counts = field.name.endswith("_total") and field.name not in LEVELS
                lines += [f"# TYPE {PREFIX}{field.name} {'counter' if counts else 'gauge'}"]
                lines += [f"{PREFIX}{field.name} {value}"]
        with self._lock:
            lines.append(f"# TYPE {PREFIX}http_responses_total counter")
            for (path, status), count in sorted(self._requests.items()):
                labels = f'path="{path}",status="{status}"'
                lines.append(f"{PREFIX}http_responses_total{{{labels}}} {count}")
            lines.append(f"# TYPE {PREFIX}clients_gone_total counter")
            lines.append(f"{PREFIX}clients_gone_total {self.gone}")
            for name, histogram in self._histograms.items():
                lines += histogram.lines(PREFIX + name)
        return "\n".join(lines) + "\n"
