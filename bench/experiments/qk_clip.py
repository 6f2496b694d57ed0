"""(b) Attention logits under Muon without clipping, and held at tau with it.

    python bench/experiments/qk_clip.py [--quick]

`tiny` is the named config on one device; the small model is trained at a higher rate for longer.
Each is trained twice by one program, with a tau that no logit reaches and with one that bites.
Source: [K2-TR] figure 2.
"""

import dataclasses
import statistics
from pathlib import Path

import lab
import results
from lab import Cell
from results import Row, Trial

from k2jax.config import MeshConfig, override
from k2jax.configs import load

# Rate, steps and tau; tau is about 0.4 of the largest logit of the same run unclipped.
SMALL, TINY = (0.04, 400, 10.0), (0.01, 120, 10.0)


def cells(quick: bool) -> list[Cell]:
    """The named config, and a small model with three seeds."""
    if quick:
        trials = [Trial(0.04, 12, tau=tau) for tau in (results.NEVER, 0.05)]
        run = lab.small_run(lab.model(32, 1, 4, vocab=512))
        return [Cell("quick", run, lambda _: trials, 1)]
    # With the vocabulary and momentum that `tiny` had when this was measured.
    tiny = override(load("tiny"), {"model.vocab": "4096", "optim.momentum": "0.95"})
    tiny = dataclasses.replace(tiny, mesh=MeshConfig())
    small = lab.small_run(lab.model(64, 2, 4))
    return [
        Cell("tiny", tiny, lambda _: both(*TINY, seeds=(0,)), 1),
        Cell("0.24M", small, lambda _: both(*SMALL, seeds=lab.SEEDS), 2),
    ]


def both(rate: float, steps: int, tau: float, seeds) -> list[Trial]:
    """Unclipped and clipped."""
    return [Trial(rate, steps, seed, t) for seed in seeds for t in (results.NEVER, tau)]


def show(rows: list[Row], picture: Path) -> str:
    """Largest logits, clip rates and losses of both."""
    names = list(dict.fromkeys(row.cell for row in rows))
    fig, axes = results.figure(len(names), 2)
    lines = []
    for at, name in enumerate(names):
        taus = sorted({row.tau for row in rows if row.cell == name}, reverse=True)
        free: dict[int, list[Row]] = {}
        for colour, tau in enumerate(taus):
            blocks = results.finals(rows, name, tau=tau)
            free = free or blocks
            label = "unclipped" if tau == results.NEVER else f"tau {tau:g}"
            for block in blocks.values():
                style = {"color": results.COLOURS[colour], "alpha": 0.8, "linewidth": 1}
                style["label"] = label if block is blocks[0] else None
                steps = [row.step for row in block]
                axes[at].plot(steps, [row.logit_max for row in block], **style)
                losses = results.smooth([row.loss for row in block], max(len(block) // 20, 1))
                axes[at + len(names)].plot(steps, losses, **style)
            lines.append((name, label, *numbers(blocks, free)))
        if taus[-1] != results.NEVER:
            axes[at].axhline(taus[-1], color="grey", linestyle=":", label="tau")
        axes[at].set(title=name, xlabel="step", ylabel="largest attention logit")
        axes[at + len(names)].set(xlabel="step", ylabel="nats a token, training")
        axes[at].legend(fontsize=8)
    results.save(fig, picture)
    head = ["model", "", "rate", "tokens", "seeds", "largest logit", "in its last tenth", "clipped"]
    head += ["worst step over unclipped", "held-out loss", "over unclipped"]
    return results.markdown(head, lines)


def numbers(blocks: dict[int, list[Row]], free: dict[int, list[Row]]) -> tuple:
    """A line of the table."""
    last = blocks[0][-1]
    top = [max(row.logit_max for row in block) for block in blocks.values()]
    late = [max(r.logit_max for r in b[-max(len(b) // 10, 1) :]) for b in blocks.values()]
    clipped = [statistics.fmean(row.clipped for row in block) for block in blocks.values()]
    pairs = [
        blocks[seed][-1].heldout / free[seed][-1].heldout - 1 for seed in blocks if seed in free
    ]
    return (
        f"{last.rate:g}",
        f"{last.tokens:,}",
        len(blocks),
        results.spread(top, 1),
        results.spread(late, 1),
        f"{statistics.fmean(clipped):.1%}",
        f"{excess(blocks, free):+.2%}",
        results.spread(results.heldout(blocks)),
        f"{statistics.fmean(pairs):+.2%}",
    )


def excess(blocks: dict[int, list[Row]], free: dict[int, list[Row]]) -> float:
    """Largest relative excess of a training loss over the unclipped run's on the same rows."""
    return max(
        row.loss / other.loss - 1
        for seed in blocks.keys() & free.keys()
        for row, other in zip(blocks[seed], free[seed], strict=True)
    )


if __name__ == "__main__":
    lab.main("qk_clip", cells, show)
