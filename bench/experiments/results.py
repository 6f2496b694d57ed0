"""Results of the experiments: the table they are kept in, and how they are shown."""

import csv
import dataclasses
import fcntl
import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NEVER = 1e9  # a tau that no logit reaches: QK-Clip is off


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of a cell's program.

    Attributes:
        rate: peak learning rate.
        steps: of the run; its schedule is warm-up over a tenth, constant, cosine over a half.
        seed: draws weights and orders rows.
        tau: QK-Clip's threshold.
    """

    rate: float
    steps: int
    seed: int = 0
    tau: float = NEVER


@dataclasses.dataclass(frozen=True)
class Row:
    """Some steps of a trial: means of losses and shares, the largest logit.

    Attributes:
        cell: name of the cell.
        rate: of the trial, as are steps, seed and tau.
        steps: see `Trial`.
        seed: see `Trial`.
        tau: see `Trial`.
        step: the last one of this row.
        tokens: seen so far.
        cpu_seconds: of all steps so far, over all threads, without compiling and evaluating.
        loss: of training, nats a token, mean.
        logit_max: largest attention logit.
        clipped: share of head-steps above tau.
        update_rms: mean.
        heldout: nats a token, in a trial's last row.
    """

    cell: str
    rate: float
    steps: int
    seed: int
    tau: float
    step: int
    tokens: int
    cpu_seconds: float
    loss: float
    logit_max: float
    clipped: float
    update_rms: float
    heldout: float | None

    @property
    def trial(self) -> Trial:
        """What it is a row of."""
        return Trial(self.rate, self.steps, self.seed, self.tau)


def short(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


class Table:
    """The CSV file of an experiment."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[Row]:
        """All of them, in the order in which trials finished."""
        if not self.path.exists():
            return []
        kinds = {field.name: field.type for field in dataclasses.fields(Row)}
        read = {str: str, int: int, float: float}
        with self.path.open(newline="") as file:
            return [
                Row(**{k: read.get(kinds[k], optional)(v) for k, v in line.items()})
                for line in csv.DictReader(file)
            ]

    def append(self, rows: list[Row]) -> None:
        """A trial's block, whole or not at all; several processes may share the file."""
        names = [field.name for field in dataclasses.fields(Row)]
        text = io.StringIO()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = csv.DictWriter(text, names, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
            file.write(text.getvalue())

    def heldout(self, cell: str) -> dict[Trial, float]:
        """Of each finished trial of a cell."""
        return {r.trial: r.heldout for r in self.rows() if r.cell == cell and r.heldout is not None}


def optional(text: str) -> float | None:
    """A number, or nothing."""
    return float(text) if text else None


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown(head: list[str], lines: Iterable[Iterable[Any]]) -> str:
    """A table."""
    rows = [head, ["---"] * len(head), *[list(map(str, line)) for line in lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def finals(rows: list[Row], cell: str, **like: float) -> dict[int, list[Row]]:
    """By seed: the rows at the rate that did best on seed 0, of trials that are `like` that."""

    def fits(r):
        return r.cell == cell and all(getattr(r, k) == v for k, v in like.items())

    mine = [row for row in rows if fits(row)]
    ends = [row for row in mine if row.heldout is not None and row.seed == 0]
    if not ends:
        return {}
    rate = min(ends, key=lambda row: row.heldout).rate
    found: dict[int, list[Row]] = {}
    for row in mine:
        if row.rate == rate:
            found.setdefault(row.seed, []).append(row)
    return found


def heldout(blocks: dict[int, list[Row]]) -> list[float]:
    """Last held-out loss of each seed."""
    return [block[-1].heldout for block in blocks.values()]


def curve(blocks: dict[int, list[Row]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Mean over seeds."""
    points = list(zip(*blocks.values(), strict=True))

    def mean(name):
        return [statistics.fmean(getattr(r, name) for r in rows) for rows in points]

    return mean(x), mean(y)


def smooth(values: list[float], width: int) -> list[float]:
    """Means over the last `width` values."""
    return [statistics.fmean(values[max(k + 1 - width, 0) : k + 1]) for k in range(len(values))]


COLOURS = ("#d1495b", "#2e6f95", "#e9a23b", "#4c9f70", "#7a5195")


def figure(columns: int, rows: int = 1, width: float = 4.0, height: float = 3.1):
    """A light figure and its axes, row by row."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    fig = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    every = list(fig.subplots(rows, columns, squeeze=False).flat)
    for axes in every:
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
    return fig, every


def save(fig, path: Path) -> None:
    """As a small PNG."""
    fig.savefig(path, dpi=100)
