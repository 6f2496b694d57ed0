"""What a run writes of its steps."""

import json

import jax.numpy as jnp

from k2jax.training.metrics import MetricsFile, metrics_to_host, to_line


def test_a_number_that_is_not_finite_is_null_in_every_line(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0, print)
    file.write(to_line(3, {"loss": float("nan"), "layers": [1.0, float("inf")]}))
    file.close()
    (line,) = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert line == {"step": 3, "loss": None, "layers": [1.0, None]}


def test_metrics_come_to_the_host_as_numbers_and_lists_and_the_load_as_counts():
    on_devices = {
        "loss": jnp.float32(2.5),
        "expert_load": jnp.float32([[3, 1]]),
        "tops": jnp.ones(2),
    }
    host = metrics_to_host(on_devices)
    assert host == {"loss": 2.5, "expert_load": [[3, 1]], "tops": [1.0, 1.0]}
    assert all(isinstance(count, int) for count in host["expert_load"][0])
