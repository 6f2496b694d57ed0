"""What saving every 50 steps costs training of `tiny`: `python bench/save_cost.py [PAIRS]`.

Blocks of real steps (MuonClip, mesh of `tiny`) in turn without and with one save, which begins
after the block's first step and is written while the others run; the block ends when that is done.
The difference of a pair is what a save takes of the machine; it is set against 50 steps of the same
run. Prints one JSON line.
"""

import json
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from k2jax.checkpoint import Checkpoints, preload_orbax
from k2jax.configs import load
from k2jax.model.batch import to_devices
from k2jax.params.arrays import initial
from k2jax.runtime.backend import prepare
from k2jax.sharding import make_mesh
from k2jax.training.step import build

STEPS, EVERY = 4, 50


def batch(run):
    """Rows of random tokens, each one document."""
    shape = run.data.rows, run.data.context
    tokens = np.random.default_rng(0).integers(0, run.model.vocab, shape, np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": np.ones(shape, np.float32),
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }


class Run:
    """Steps of `tiny`, with clocks."""

    def __init__(self, folder: str):
        run = load("tiny")
        program = build(run)
        self.rows = to_devices(batch(run), run.train.accumulate)
        self.state = jax.jit(program.init)(initial(program.specs, 0, run.model.init_std))
        self.step = jax.jit(program.step, donate_argnums=0)
        self.saved, self.number, self.blocked = Checkpoints(folder, 2), 0, []

    def block(self, save: bool) -> tuple[float, float]:
        """Seconds by the clock and of the processor."""
        wall, cpu = time.perf_counter(), time.process_time()
        for index in range(STEPS):
            self.state, found = self.step(self.state, self.rows)
            jax.block_until_ready(found)
            if save and index == 0:
                self.number += 1
                began = time.perf_counter()
                self.saved.save(self.number, self.state._asdict(), {})
                self.blocked.append(time.perf_counter() - began)
        self.saved.wait()
        return time.perf_counter() - wall, time.process_time() - cpu


def main(pairs: int) -> None:
    """Blocks in turn; which of a pair comes first changes."""
    prepare(load("tiny").mesh.devices)
    preload_orbax().join()
    with jax.set_mesh(make_mesh(load("tiny").mesh)), tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        run.block(save=True)  # compiles; the first save makes its threads
        run.blocked.clear()
        bare, saving = [], []
        for pair in range(pairs):
            for save in (False, True) if pair % 2 else (True, False):
                (saving if save else bare).append(run.block(save))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state))
        run.saved.close()
    found: dict = {"bench": "save_cost", "pairs": pairs, "state_bytes": size}
    for place, clock in enumerate(("wall", "cpu")):
        step = statistics.median(block[place] for block in bare) / STEPS
        extra = [b[place] - a[place] for a, b in zip(bare, saving, strict=True)]
        low, middle, high = (round(float(q), 3) for q in np.quantile(extra, (0.25, 0.5, 0.75)))
        found |= {
            f"{clock}_step": round(step, 3),
            f"{clock}_save": middle,
            f"{clock}_save_quartiles": [low, high],
            f"{clock}_share_every_{EVERY}": round(middle / (EVERY * step), 4),
        }
    found["blocked_seconds_median"] = round(statistics.median(run.blocked), 4)
    found["blocked_seconds_max"] = round(max(run.blocked), 4)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
