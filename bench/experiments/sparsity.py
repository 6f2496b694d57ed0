"""(c) The sparsity law: more experts at equal active parameters.

    python bench/experiments/sparsity.py [--quick]

Sparsity is experts over experts a token (2 of 16, 32, 64, 96). Everything else is equal.
Source: [K2-TR] section 2.2, figure 5.
"""

import statistics
from pathlib import Path

import lab
import results
from lab import Cell
from results import Row, Trial

SPARSITIES = (8, 16, 32, 48)
RATE, STEPS = 0.02, 150


def cells(quick: bool) -> list[Cell]:
    """One a sparsity."""
    found = []
    for sparsity in (4, 8) if quick else SPARSITIES:
        small = {"vocab": 512} if quick else {}
        cfg = lab.model(*((32, 1, 2) if quick else (64, 2, 4)), experts=2 * sparsity, **small)
        seeds, steps = ((0,), 12) if quick else (lab.SEEDS, STEPS)
        trials = [Trial(RATE, steps, seed) for seed in seeds]
        name = f"sparsity {sparsity}"
        found.append(Cell(name, lab.small_run(cfg), lambda _, t=trials: t, max(steps // 40, 1)))
    return found


def show(rows: list[Row], picture: Path) -> str:
    """Loss by sparsity."""
    names = sorted({row.cell for row in rows}, key=lambda name: int(name.split()[1]))
    fig, (left, right) = results.figure(2)
    lines, ends = [], []
    for at, name in enumerate(names):
        blocks = results.finals(rows, name)
        losses = results.heldout(blocks)
        sparsity = int(name.split()[1])
        ends.append((sparsity, losses))
        left.plot(*results.curve(blocks, "tokens", "loss"), label=name, color=results.COLOURS[at])
        last = blocks[0][-1]
        gap = statistics.fmean(losses) / statistics.fmean(ends[0][1]) - 1
        lines.append(
            (sparsity, 2 * sparsity, f"{last.tokens:,}", results.spread(losses), f"{gap:+.2%}")
        )
    for sparsity, losses in ends:
        right.plot([sparsity] * len(losses), losses, "o", color=results.COLOURS[1], alpha=0.5)
    right.plot(
        *zip(*[(s, statistics.fmean(y)) for s, y in ends], strict=True), color=results.COLOURS[0]
    )
    left.set(xlabel="tokens", ylabel="nats a token, training")
    left.legend(fontsize=8)
    right.set(xlabel="sparsity", ylabel="nats a token, held out", xscale="log")
    right.set_xticks([s for s, _ in ends], [str(s) for s, _ in ends], minor=False)
    right.minorticks_off()
    results.save(fig, picture)
    head = ["sparsity", "experts", "tokens", "held-out loss", "against the first"]
    return results.markdown(head, lines)


if __name__ == "__main__":
    lab.main("sparsity", cells, show)
