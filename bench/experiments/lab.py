"""What the experiments share: how a model is trained, where results are kept, how they look.

An experiment is a list of cells. A cell is one compiled program; its trials differ in what that
program takes as an argument (learning rate, steps, seed, tau), so that a sweep compiles once. A
finished trial is a block of rows in a CSV file and is never run again.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from results import NEVER, Row, Table, Trial, short

from k2jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from k2jax.data import Batches, Data, eval_batches, open_data
from k2jax.model.batch import to_devices
from k2jax.optim import warmup_stable_decay
from k2jax.params.arrays import initial
from k2jax.params.counts import count_parameters
from k2jax.runtime import backend as startup
from k2jax.runtime.versions import fast_compile_flags
from k2jax.training.step import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SEEDS = (0, 1, 2)
HELDOUT_ROWS = 256  # 32,768 tokens
Options = dict[str, str | bool]
# On a CPU, LLVM's first level: less time to compile, and steps are as fast.
OPTIONS: Options = {"xla_backend_optimization_level": "1"}
HASTY: Options = fast_compile_flags()  # a third of the time to compile, steps three times as long


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program and what to train with it.

    Attributes:
        name: in the table's first column.
        run: sizes and optimizer; rate, schedule, tau and seeds come from the trial.
        todo: all trials known so far, given the held-out loss of each finished one.
        every: steps that a row of the table stands for.
    """

    name: str
    run: RunConfig
    todo: Callable[[dict[Trial, float]], list[Trial]]
    every: int = 10


def model(embed: int, moe_layers: int, heads: int, **other: int) -> ModelConfig:
    """A small Kimi K2 in about K2's proportions, one dense layer first."""
    sizes = {
        "vocab": 1_024,
        "embed": embed,
        "dense_layers": 1,
        "moe_layers": moe_layers,
        "heads": heads,
        "q_rank": embed * 3 // 8,
        "kv_rank": embed // 4,
        "nope": 16,
        "rope": 8,
        "value": 16,
        "ffw": embed * 11 // 4,
        "experts": 8,
        "expert_ffw": embed // 2,
        "experts_per_token": 2,
        "context": 128,
    }
    return ModelConfig(**(sizes | other))


def small_run(
    cfg: ModelConfig, optimizer: str = "muonclip", rows: int = 8, **optim: Any
) -> RunConfig:
    """One device, float32, K2's recipe but for rate and schedule; a faster router bias."""
    clip = 1.0 if optimizer == "adamw" else 0.0
    return RunConfig(
        name=optimizer,
        model=cfg,
        data=DataConfig(rows=8, context=cfg.context),
        optim=OptimConfig(name=optimizer, bias_rate=2e-2, clip_norm=clip, **optim),
        train=TrainConfig(dtype="float32", remat="none"),
    )


def active(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters that work on a token, embedding and head included, and all of them."""
    counted = count_parameters(cfg)
    return counted["active_parameters_with_head_and_embedding"], counted["total_parameters"]


def tuned(
    found: dict[Trial, float],
    rates: Iterable[float],
    steps: int,
    seeds: Iterable[int] = SEEDS,
    tau: float = NEVER,
) -> list[Trial]:
    """A sweep over rates, widened by factors of 2 until the best lies inside; then more seeds."""
    trials = [Trial(rate, steps, tau=tau) for rate in sorted(rates)]
    while all(trial in found for trial in trials):
        at = min(range(len(trials)), key=lambda k: found[trials[k]])
        if len(trials) > 2 and at == 0:
            trials.insert(0, Trial(trials[0].rate / 2, steps, tau=tau))
        elif len(trials) > 2 and at == len(trials) - 1:
            trials.append(Trial(trials[-1].rate * 2, steps, tau=tau))
        else:
            return trials + [dataclasses.replace(trials[at], seed=seed) for seed in seeds if seed]
    return trials


class Lab:
    """A cell's compiled programs and its data."""

    def __init__(self, cell: Cell, data: Data, options: Options):
        self.cell, self.data, self.run = cell, data, cell.run
        self.program = build(cell.run)
        state, batch = self.program.abstract_state(), self.program.abstract_batch()
        number = jax.ShapeDtypeStruct((), jnp.float32)
        rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch)
        self.step = (
            jax.jit(self._step, donate_argnums=0)
            .lower(state, batch, number, number)
            .compile(options)
        )
        self.evaluate = jax.jit(self.program.evaluate).lower(state.params, rows).compile(options)
        text = self.run.data
        self.heldout = [
            to_devices(batch)
            for batch in eval_batches(data.heldout, text.rows, text.context, limit=HELDOUT_ROWS)
        ]

    def _step(self, state, batch, rate: jax.Array, tau: jax.Array):
        optim = dataclasses.replace(
            self.run.optim, learning_rate=rate, tau=tau, warmup=0, decay=0.0
        )
        return build(dataclasses.replace(self.run, optim=optim)).step(state, batch)

    def train(self, trial: Trial) -> list[Row]:
        """The rows of one trial; it ends early if the loss is not finite."""
        data, rows = self.run.data, []
        batches = Batches(self.data.train, data.rows, data.context, trial.seed)
        warmup = max(trial.steps // 10, 1)
        rate = warmup_stable_decay(trial.rate, trial.steps, warmup=warmup, decay=0.5, final=0.1)
        rates = np.asarray(rate(jnp.arange(trial.steps)), np.float32)
        params = initial(self.program.specs, trial.seed, self.run.model.init_std)
        state, seconds, seen = self.program.init(params), 0.0, []
        tau = np.float32(trial.tau)
        for step in range(trial.steps):
            batch = to_devices(batches.batch(step), 1)
            began = time.process_time()
            state, found = self.step(state, batch, rates[step], tau)
            found = jax.device_get(found)
            seconds += time.process_time() - began
            seen.append(found)
            last = step + 1 == trial.steps or not np.isfinite(found["loss"])
            if last or (step + 1) % self.cell.every == 0:
                heldout = self._heldout(state.params) if last else None
                rows.append(self._row(trial, step + 1, seconds, seen, heldout))
                seen = []
            if last:
                break
        return rows

    def _row(self, trial: Trial, step: int, seconds: float, seen, heldout) -> Row:
        def mean(name):
            return short(statistics.fmean(float(f.get(name, 0)) for f in seen))

        tokens = step * self.run.data.rows * self.run.data.context
        return Row(
            self.cell.name,
            **dataclasses.asdict(trial),
            step=step,
            tokens=tokens,
            cpu_seconds=round(seconds, 2),
            loss=mean("loss"),
            logit_max=short(max(float(f["logit_max"]) for f in seen)),
            clipped=mean("clipped"),
            update_rms=mean("update_rms"),
            heldout=heldout,
        )

    def _heldout(self, params) -> float:
        nll = count = 0.0
        for rows in self.heldout:
            part, targets = self.evaluate(params, rows)
            nll, count = nll + float(part), count + float(targets)
        return short(nll / count) if math.isfinite(nll) else math.inf


def main(
    name: str, cells: Callable[[bool], list[Cell]], show: Callable[[list[Row], Path], str]
) -> None:
    """The command line of an experiment: run what is not finished, then table and plot.

    Args:
        name: of the CSV and of the picture.
        cells: what to run, given whether in a minute.
        show: draws the picture and returns the table.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, help="folder of CSV and picture")
    parser.add_argument("--part", default="0/1", help="K/N: every N-th cell from the K-th")
    parser.add_argument("--show", action="store_true", help="run nothing: table and plot")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    kept = args.out or (ROOT / "runs" / "experiments" if args.quick else HERE / "data")
    table = Table(kept / f"{name}.csv")
    if not args.show:
        startup.prepare()
        measure(cells(args.quick)[part::parts], table, HASTY if args.quick else OPTIONS)
    if part == 0:
        pictures = kept if args.quick or args.out else ROOT / "docs" / "experiments"
        pictures.mkdir(parents=True, exist_ok=True)
        print(show(table.rows(), pictures / f"{name}.png"))


def measure(cells: list[Cell], table: Table, options: Options) -> None:
    """Run every unfinished trial; sizes and tokens are printed first."""
    for cell in cells:
        work, every = active(cell.run.model)
        known = cell.todo(table.heldout(cell.name))
        tokens = sum(t.steps for t in known) * cell.run.data.rows * cell.run.data.context
        print(
            f"{cell.name}: {every / 1e6:.2f}M parameters, {work / 1e6:.2f}M active; trials known"
            f" so far: {len(known)}, {tokens / 1e6:.2f}M tokens"
        )
    for cell in cells:
        run_cell(cell, table, options)


def run_cell(cell: Cell, table: Table, options: Options) -> None:
    """Run its unfinished trials, as long as there are any."""
    lab = None
    while True:
        found = table.heldout(cell.name)
        left = [trial for trial in cell.todo(found) if trial not in found]
        if not left:
            return
        if lab is None:
            began = time.process_time()
            lab = Lab(cell, open_data(vocab=cell.run.model.vocab, progress=print), options)
            print(f"{cell.name}: compiled in {time.process_time() - began:.0f} CPU-s")
        rows = lab.train(left[0])
        table.append(rows)
        print(
            f"{cell.name} {left[0]}: {rows[-1].heldout:.4f} nats a token held out,"
            f" {rows[-1].cpu_seconds:.0f} CPU-s, largest logit"
            f" {max(row.logit_max for row in rows):.1f}",
            flush=True,
        )
