"""(a) Muon against AdamW, both tuned over the learning rate, at three sizes.

    python bench/experiments/muon_adamw.py [--quick]

How much less compute does Muon need for AdamW's final loss? AdamW moves everything in its runs;
Muon's runs are K2's recipe, where AdamW moves embeddings, head and gains. One rate for both groups.
Muon is also trained for fewer tokens, each time with a whole schedule, at the rate of its full
budget; where its loss crosses AdamW's is interpolated, linearly in the log of tokens or seconds.
"""

import itertools
import math
import statistics
from pathlib import Path

import lab
import results
from lab import Cell
from results import Row, Trial

TAU = 100.0  # K2's; no logit comes near it in these runs
SIZES = {
    "0.24M": (lab.model(64, 2, 4), 300),
    "0.5M": (lab.model(96, 3, 6), 120),
    "1.1M": (lab.model(160, 3, 8), 80),
}
QUICK = {"quick": (lab.model(32, 1, 2, vocab=512), 16)}
RATES = {"muonclip": (0.01, 0.02, 0.04), "adamw": (0.002, 0.004, 0.008)}
SHARES = (0.45, 0.65, 0.8)  # of AdamW's steps


def cells(quick: bool) -> list[Cell]:
    """Small sizes first; every second one is the other optimizer's."""
    found = []
    for at, (size, (cfg, steps)) in enumerate((QUICK if quick else SIZES).items()):
        names = ["muonclip", "adamw"] if at % 2 else ["adamw", "muonclip"]
        for name in names:

            def todo(found, name=name, steps=steps):
                return trials(name, steps, found, quick)

            every = max(steps // 40, 1)
            found.append(Cell(f"{size} {name}", lab.small_run(cfg, name), todo, every))
    return found


def trials(name: str, steps: int, found: dict[Trial, float], quick: bool) -> list[Trial]:
    """The sweep and its seeds; then, for Muon, fewer tokens."""
    tau = TAU if name == "muonclip" else results.NEVER
    if quick:
        lengths = (steps, steps // 2) if name == "muonclip" else (steps,)
        return [Trial(RATES[name][1], length, tau=tau) for length in lengths]
    known = lab.tuned(found, RATES[name], steps, tau=tau)
    if name == "muonclip" and all(trial in found for trial in known):
        shorter = [round(steps * share) for share in SHARES]
        known += [Trial(known[-1].rate, number, tau=tau) for number in shorter]
    return known


def show(rows: list[Row], picture: Path) -> str:
    """Losses, and Muon's share of tokens and of seconds for AdamW's loss."""
    sizes = list(dict.fromkeys(row.cell.split()[0] for row in rows))
    fig, axes = results.figure(len(sizes), 2)
    lines = []
    for at, size in enumerate(sizes):
        steps = max(row.steps for row in rows if row.cell.startswith(size))
        adam = results.finals(rows, f"{size} adamw", steps=steps)
        budgets = muons(rows, size)
        if not adam or steps not in budgets:
            continue
        draw(axes[at], axes[at + len(sizes)], size, adam, budgets)
        wanted = statistics.fmean(results.heldout(adam))
        for name, blocks in (("AdamW", adam), ("Muon", budgets[steps])):
            last = next(iter(blocks.values()))[-1]
            seconds = results.spread([b[-1].cpu_seconds for b in blocks.values()], 0)
            by = [share(budgets, wanted, what) for what in ("tokens", "cpu_seconds")]
            base = (last.tokens, statistics.fmean(b[-1].cpu_seconds for b in adam.values()))
            parts = [f"{b / a:.2f}" if b else "-" for a, b in zip(base, by, strict=True)]
            parts = parts if name == "Muon" else ["1", "1"]
            loss = results.spread(results.heldout(blocks))
            lines.append((size, name, last.rate, f"{last.tokens:,}", loss, seconds, *parts))
    results.save(fig, picture)
    head = ["active", "optimizer", "best rate", "tokens", "held-out loss", "CPU-s"]
    return results.markdown([*head, "tokens for AdamW's loss", "CPU-s for AdamW's loss"], lines)


def muons(rows: list[Row], size: str) -> dict[int, dict[int, list[Row]]]:
    """Muon's blocks by steps, all at the rate of the longest."""
    cell = f"{size} muonclip"
    lengths = sorted({row.steps for row in rows if row.cell == cell})
    if not lengths:
        return {}
    best = results.finals(rows, cell, steps=lengths[-1])
    rate = next(iter(best.values()))[0].rate
    return {steps: results.finals(rows, cell, steps=steps, rate=rate) for steps in lengths}


def share(budgets, wanted: float, what: str) -> float | None:
    """Tokens or seconds at which Muon's final loss is `wanted`; None outside of what was run."""
    points = []
    for blocks in budgets.values():
        x = statistics.fmean(getattr(block[-1], what) for block in blocks.values())
        points.append((x, statistics.fmean(results.heldout(blocks))))
    for (x, y), (x2, y2) in itertools.pairwise(points):
        if y >= wanted >= y2:
            return math.exp(math.log(x) + (y - wanted) / (y - y2) * math.log(x2 / x))
    return None


def draw(by_tokens, by_seconds, size: str, adam, budgets) -> None:
    """Training losses of both, and where shorter runs of Muon end."""
    full = budgets[max(budgets)]
    for axes, x, label in ((by_tokens, "tokens", "tokens"), (by_seconds, "cpu_seconds", "CPU-s")):
        for blocks, name, colour in ((adam, "AdamW", 1), (full, "Muon", 0)):
            axes.plot(*results.curve(blocks, x, "loss"), color=results.COLOURS[colour], label=name)
        ends = [results.curve(blocks, x, "loss") for blocks in budgets.values()]
        final = [statistics.fmean(results.heldout(blocks)) for blocks in budgets.values()]
        axes.plot(
            [e[0][-1] for e in ends],
            final,
            "o:",
            color=results.COLOURS[0],
            label="Muon's runs, held out",
        )
        wanted = statistics.fmean(results.heldout(adam))
        axes.axhline(wanted, color=results.COLOURS[1], linestyle=":", label="AdamW, held out")
        axes.set(xlabel=label, ylabel="nats a token", title=f"{size} active")
        axes.set_ylim(top=wanted + 1.5)
    by_tokens.legend(fontsize=8)


if __name__ == "__main__":
    lab.main("muon_adamw", cells, show)
