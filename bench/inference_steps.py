"""Steps of the engine's programs, `tiny`: `python bench/inference_steps.py [runs]`; one JSON line.

Decoding at 1, 8 and 16 sequences of 160 tokens, prompts of 64 and 256 tokens alone, float32, random
weights, two CPU cores. Also what warming up takes (from the cache of programs, if it has them) and
the memory of the process. Medians over the runs.
"""

import dataclasses
import json
import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from k2jax.configs import load
from k2jax.inference.runner import Chunk, Runner
from k2jax.model import Kimi, Model
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.runtime import backend, memory

CONTEXT, CORES, ROWS, SEEN, PROMPTS = 1_024, 2, (1, 8, 16), 160, (64, 256)


def time_calls(runner: Runner, chunks: list[Chunk], decode: bool, runs: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        jax.block_until_ready(runner.forward(chunks, decode))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main(runs: int) -> None:
    """Time the programs and print the medians."""
    if hasattr(os, "sched_setaffinity"):  # before JAX counts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    backend.prepare()
    cfg = dataclasses.replace(load("tiny").model, context=CONTEXT)
    params = initial(specs(Kimi(cfg)), 0, cfg.init_std)
    began = time.perf_counter()
    runner = Runner(Model(cfg, params), rows=max(ROWS), pages=16 * CONTEXT // 16 + 1)
    runner.warm_up()
    result = {
        "bench": "inference_steps",
        "runs": runs,
        "jax": jax.__version__,
        "warm_up_s": round(time.perf_counter() - began, 2),
    }
    ids = np.random.default_rng(0).integers(0, cfg.vocab, CONTEXT).tolist()
    pages = CONTEXT // runner.page
    tables = [np.arange(1 + pages * i, 1 + pages * (i + 1)) for i in range(max(ROWS))]
    for length in PROMPTS:
        prompt = [
            Chunk(ids[at : at + runner.block], at, tables[0], "none")
            for at in range(0, length, runner.block)
        ]
        prompt[-1] = prompt[-1]._replace(want="last")
        seconds = time_calls(runner, prompt, False, runs)
        result[f"prompt_tokens_per_s_{length}"] = round(length / seconds)
    for rows in ROWS:
        tokens = [Chunk(ids[i : i + 1], SEEN, tables[i], "last") for i in range(rows)]
        seconds = time_calls(runner, tokens, True, runs)
        result[f"decode_ms_{rows}"] = round(1e3 * seconds, 2)
    print(json.dumps(result | {"memory_gb": round(memory.resident() / 1e9, 2)}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
