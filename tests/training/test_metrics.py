"""What a run writes of its steps."""

import json

from k2jax.training.metrics import Metrics, Speed


def test_rates_follow_from_the_seconds_of_a_step_and_its_wait():
    found = Speed(tokens=1000, flops=6e6, peak=1e10).of(1.5, 0.5)
    assert found["tokens_per_second"] == 500
    assert found["flops_per_second"] == 3e9
    assert found["mfu"] == 0.3
    assert (found["seconds"], found["input_seconds"]) == (1.5, 0.5)
    assert "mfu" not in Speed(1000, 6e6, 0.0).of(1.0, 0.0)


def test_a_number_that_is_not_finite_is_null_in_every_line(tmp_path):
    with Metrics(tmp_path / "m.jsonl", 0, lambda step: 0.5 * step, print) as metrics:
        metrics.write(3, {"loss": float("nan"), "layers": [1.0, float("inf")]}, applied=1)
    (line,) = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert line == {"step": 3, "learning_rate": 0.5, "loss": None, "layers": [1.0, None]}
