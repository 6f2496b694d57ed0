"""What a run writes and shows of its steps."""

import io
import json

from rich.console import Console

from k2jax import configs
from k2jax.training.dashboard import table
from k2jax.training.metrics import Metrics, Progress, Speed

VALUES = {
    "loss": 3.25, "grad_norm": 0.31, "update_norm": 1.5, "logit_max": 39.4, "clipped": 0.125,
    "load_max": 1.786, "load_entropy": 0.98, "seconds": 0.9, "input_seconds": 0.1,
    "tokens_per_second": 2048.0, "mfu": 0.315, "host_bytes": 2_500_000_000,
}  # fmt: skip
HELDOUT = {"heldout_loss": 3.5, "heldout_bits_per_byte": 1.543}


def shown(*args) -> str:
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(table(*args))
    return console.export_text()


def test_the_terminal_has_every_number_with_its_unit():
    text = shown(VALUES | HELDOUT, 2, 1)
    for part in ("loss 3.2500", "held out 3.5000 (1.543 bits/byte)", "gradient 0.31", "update 1.5",
                 "largest logit 39.4", "clipped heads 12.5%", "busiest expert 1.79 x mean",
                 "load entropy 0.980", "tokens/s 2,048", "MFU 31.5%", "input wait 10.0%",
                 "host memory 2.50 GB", "2 skipped, 1 spikes"):  # fmt: skip
        assert part in text, part
    assert len(text.splitlines()) == 4


def test_what_a_run_does_not_measure_is_a_dash():
    text = shown({"loss": float("nan")}, 0, 0)
    assert "loss nan" in text
    assert text.count(" -") == 11


def test_a_terminal_keeps_the_newest_held_out_loss(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run, console = configs.load("tiny"), Console(record=True, width=110, file=io.StringIO())
    with Progress(run, 0, lambda line: None, 0.0) as progress:
        progress.show(1, VALUES | HELDOUT)
        progress.show(2, VALUES, skipped=1)
        console.print(progress.live.renderable)
    text = console.export_text()
    assert "held out 3.5000" in text
    assert "1 skipped, 0 spikes" in text
    assert "2/150" in text


def test_without_a_terminal_there_are_plain_lines(capsys):
    lines = []
    with Progress(configs.load("tiny"), 0, lines.append, 0.0) as progress:
        for step in range(1, 21):
            progress.show(step, VALUES | HELDOUT if step == 20 else VALUES)
        progress.show(30, VALUES)
    assert lines[1].startswith("step 10/150: loss 3.2500, ")
    assert "held out 3.5000 (" in lines[2]
    assert " at step" not in lines[2]
    assert "bits per byte) at step 20, " in lines[3]
    assert len(lines) == 4
    assert not capsys.readouterr().out


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
