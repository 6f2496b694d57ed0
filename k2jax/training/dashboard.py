"""A run on a terminal: a few lines under the progress bar that say how it is."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

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


def table(values: Mapping[str, Any], skipped: int, spikes: int) -> Table:
    """The newest metrics; one that a run does not have shows as a dash.

    Args:
        values: a step's metrics, the newest held-out loss among them.
        skipped: steps skipped so far.
        spikes: spikes so far.
    """
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
            there = all(name in known for name in needs)
            shown = form.format(*(known[name] for name in needs)) if there else "-"
            cells.append(Text.assemble((f"{label} ", "dim"), shown))
        grid.add_row(*cells)
    sick = "red" if skipped or spikes else "dim"
    grid.add_row(Text(f"{skipped} skipped, {spikes} spikes", sick))
    return grid
