"""How a run is: a bar with the newest metrics below it on a terminal, else plain lines."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from k2jax.config import RunConfig
from k2jax.runtime.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

# Rows of (label, metrics that it needs, format of them).
CELLS: tuple[tuple[tuple[str, tuple[str, ...], str], ...], ...] = (
    (
        ("loss", ("loss",), "{:.4f}"),
        ("held out", ("heldout_loss", "heldout_bits_per_byte"), "{:.4f} ({:.3f} bits/byte)"),
        ("gradient", ("grad_norm",), "{:.3g}"),
        ("update", ("update_norm",), "{:.3g}"),
    ),
    (
        ("largest logit", ("logit_max",), "{:.3g}"),
        ("clipped heads", ("clipped",), "{:.1%}"),
        ("busiest expert", ("load_max",), "{:.2f} x mean"),
        ("load entropy", ("load_entropy",), "{:.3f}"),
    ),
    (
        ("tokens/s", ("tokens_per_second",), "{:,.0f}"),
        ("MFU", ("mfu",), "{:.1%}"),
        ("input wait", ("input_share",), "{:.1%}"),
        ("host memory", ("host_gb",), "{:.2f} GB"),
    ),
)


class Dashboard:
    """Shows the steps of a run as they finish; use it as a context manager."""

    def __init__(self, run: RunConfig, start: int, say: Callable[[str], None], began: float):
        """Describe the run.

        Args:
            run: its number of steps, and how often a plain line is due.
            start: steps done before.
            say: is called with each plain line.
            began: when the command started, on `time.perf_counter`'s clock.
        """
        self.run, self.start, self.say, self.began = run, start, say, began
        self.tokens = run.data.rows * run.data.context
        self.progress = Progress(run.train.steps, say, done=start, counted=True)
        self.heldout, self.measured = "", 0
        self.newest: dict[str, Any] = {}
        self.first = 0.0

    def __enter__(self) -> "Dashboard":
        """Show the bar."""
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        self.progress.__exit__(*error)

    def show(self, step: int, values: dict[str, Any], skipped: int = 0, spikes: int = 0) -> None:
        """Show a finished step, and how many were skipped or spikes so far."""
        now = time.perf_counter()
        if step == self.start + 1:
            self.first = now
            self.say(f"first step after {now - self.began:.1f} s")
        if "heldout_loss" in values:
            self.measured = step
            self.heldout = (
                f", held out {values['heldout_loss']:.4f}"
                f" ({values['heldout_bits_per_byte']:.3f} bits per byte)"
            )
        speed = self.tokens * max(step - self.start - 1, 1) / max(now - self.first, 1e-9)
        speed = speed if step > self.start + 1 else self.tokens / values["seconds"]
        when = f" at step {self.measured}" if self.measured not in (0, step) else ""
        text = f"loss {values['loss']:.4f}{self.heldout}{when}, {speed:,.0f} tokens/s"
        if self.progress.bar is not None:
            self.newest |= values  # the held-out loss is measured seldom
            self.progress.show(step, text, draw_table(self.newest, skipped, spikes))
        elif step % self.run.train.log_every == 0 or step == self.run.train.steps:
            self.say(f"step {step}/{self.run.train.steps}: {text}")


def draw_table(values: Mapping[str, Any], skipped: int, spikes: int) -> "Table":
    """Draw the newest metrics; one that a run does not have shows as a dash.

    Args:
        values: a step's metrics, the newest held-out loss among them.
        skipped: steps skipped so far.
        spikes: spikes so far.
    """
    from rich.table import Table
    from rich.text import Text

    known = dict(values)
    if "input_seconds" in known:
        whole = known["input_seconds"] + known["seconds"]
        known["input_share"] = known["input_seconds"] / whole if whole else 0.0
    if "host_bytes" in known:
        known["host_gb"] = known["host_bytes"] / 1e9
    grid = Table.grid(padding=(0, 3))
    for row in CELLS:
        cells = []
        for label, needs, form in row:
            is_known = all(name in known for name in needs)
            shown = form.format(*(known[name] for name in needs)) if is_known else "-"
            cells.append(Text.assemble((f"{label} ", "dim"), shown))
        grid.add_row(*cells)
    sick = "red" if skipped or spikes else "dim"
    grid.add_row(Text(f"{skipped} skipped, {spikes} spikes", sick))
    return grid
