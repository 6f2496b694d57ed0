"""Notable events of a run, as lines of JSON."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2jax.runtime.files import Lines

EVENTS = "events.jsonl"


class Events:
    """Appends to `events.jsonl`, one JSON line an event: `step`, `event`, `time`, and its own."""

    def __init__(self, path: Path | None, say: Callable[[str], None] = print):
        """Open nothing yet.

        Args:
            path: None: write nothing (a process that another one writes for).
            say: is called when the file cannot be written.
        """
        self.path, self.say = path, say
        self.lines: Lines | None = None

    def add(self, step: int, event: str, **values: Any) -> None:
        """Write one, at once. A number that is not finite is written as null."""
        if self.path is None:
            return
        fields = {"step": step, "event": event, "time": round(time.time(), 3)}
        for name, value in values.items():
            sick = isinstance(value, float) and not math.isfinite(value)
            fields[name] = None if sick else value
        if self.lines is None:
            self.lines = Lines(self.path, self.say)
        self.lines.write(json.dumps(fields))

    def close(self) -> None:
        """Close the file; a later event opens it again."""
        if self.lines is not None:
            self.lines.close()
            self.lines = None
