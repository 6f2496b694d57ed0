"""What a run writes of its steps."""

import json

import jax.numpy as jnp

from k2jax.training.callbacks import WriteMetrics
from k2jax.training.metrics import METRICS, MetricsFile, metrics_to_host, read_metrics, to_line


def test_a_number_that_is_not_finite_is_null_in_every_line(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0, print)
    file.write(to_line(3, {"loss": float("nan"), "layers": [1.0, float("inf")]}))
    file.close()
    (line,) = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert line == {"step": 3, "loss": None, "layers": [1.0, None]}


def test_the_load_of_each_expert_is_in_every_so_many_lines(tmp_path):
    writer = WriteMetrics(tmp_path / METRICS, print, loads_every=2)
    writer.begin(0)
    for step in (1, 2, 3):
        writer.on_step(step, None, {"load_max_layers": [1.5], "expert_load": [[3, 1]]})
    writer.close()
    lines = list(read_metrics(tmp_path))
    assert [line.get("expert_load") for line in lines] == [None, [[3, 1]], None]
    assert all(line["load_max_layers"] == [1.5] for line in lines)


def test_a_resumed_run_keeps_the_lines_up_to_its_step_and_no_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n{"step": 3}\n{"step": 2')
    MetricsFile(path, 2, print).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    MetricsFile(path, 0, print).close()
    assert path.read_text() == ""


def test_metrics_come_to_the_host_as_numbers_and_lists_and_the_load_as_counts():
    on_devices = {
        "loss": jnp.float32(2.5),
        "expert_load": jnp.float32([[3, 1]]),
        "tops": jnp.ones(2),
    }
    host = metrics_to_host(on_devices)
    assert host == {"loss": 2.5, "expert_load": [[3, 1]], "tops": [1.0, 1.0]}
    assert all(isinstance(count, int) for count in host["expert_load"][0])
