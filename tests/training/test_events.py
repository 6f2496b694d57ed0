"""Notable events of a run, one line each."""

import json
import math

from k2jax.training.events import Events


def test_events_are_lines_of_json_without_nan(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.add(3, "skipped", loss=math.nan, limit=math.inf, batch=2)
    events.add(4, "spike", loss=9.5)
    events.close()
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert first.pop("time") > 0
    assert first == {"step": 3, "event": "skipped", "loss": None, "limit": None, "batch": 2}
    assert (second["event"], second["loss"]) == ("spike", 9.5)
    Events(None).add(1, "spike")
