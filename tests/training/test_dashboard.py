"""What a run shows of its steps."""

import io

from rich.console import Console

from k2jax import configs
from k2jax.training.dashboard import Dashboard, draw_table

VALUES = {
    "loss": 3.25,
    "grad_norm": 0.31,
    "update_norm": 1.5,
    "logit_max": 39.4,
    "clipped": 0.125,
    "load_max": 1.786,
    "load_entropy": 0.98,
    "seconds": 0.9,
    "input_seconds": 0.1,
    "tokens_per_second": 2048.0,
    "mfu": 0.315,
    "host_bytes": 2_500_000_000,
}
HELDOUT = {"heldout_loss": 3.5, "heldout_bits_per_byte": 1.543}


def shown(*args) -> str:
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(draw_table(*args))
    return console.export_text()


def test_the_terminal_has_every_number_with_its_unit():
    text = shown(VALUES | HELDOUT, 2, 1)
    for part in (
        "loss 3.2500",
        "held out 3.5000 (1.543 bits/byte)",
        "gradient 0.31",
        "update 1.5",
        "largest logit 39.4",
        "clipped heads 12.5%",
        "busiest expert 1.79 x mean",
        "load entropy 0.980",
        "tokens/s 2,048",
        "MFU 31.5%",
        "input wait 10.0%",
        "host memory 2.50 GB",
        "2 skipped, 1 spikes",
    ):
        assert part in text, part
    assert len(text.splitlines()) == 4


def test_what_a_run_does_not_measure_is_a_dash():
    text = shown({"loss": float("nan")}, 0, 0)
    assert "loss nan" in text
    assert text.count(" -") == 11


def test_a_terminal_keeps_the_newest_held_out_loss(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run, console = configs.load("tiny"), Console(record=True, width=110, file=io.StringIO())
    with Dashboard(run, 0, lambda line: None, 0.0) as dashboard:
        dashboard.show(1, VALUES | HELDOUT)
        dashboard.show(2, VALUES, skipped=1)
        console.print(dashboard.progress.live.renderable)
    text = console.export_text()
    assert "held out 3.5000" in text
    assert "1 skipped, 0 spikes" in text
    assert "2/150" in text


def test_without_a_terminal_there_are_plain_lines(capsys):
    lines = []
    with Dashboard(configs.load("tiny"), 0, lines.append, 0.0) as dashboard:
        for step in range(1, 21):
            dashboard.show(step, VALUES | HELDOUT if step == 20 else VALUES)
        dashboard.show(30, VALUES)
    assert lines[1].startswith("step 10/150: loss 3.2500, ")
    assert "held out 3.5000 (" in lines[2]
    assert " at step" not in lines[2]
    assert "bits per byte) at step 20, " in lines[3]
    assert len(lines) == 4
    assert not capsys.readouterr().out
