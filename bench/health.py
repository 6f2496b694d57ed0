"""What metrics and health checks cost a step of `tiny`: `python bench/health.py [ROUNDS]`.

Three steps of the same weights and batch take turns, so that all see the same machine: bare (loss
and new weights only), guarded (`Program.step`: norms, per-layer metrics, the choice between old
and new state), and whole (also what the loop does with the metrics of each step: fetching them,
judging the loss, one line of `metrics.jsonl`). Medians of seconds and of the process's CPU
seconds, over rounds of STEPS steps each; `host_seconds` is the processor's time for what the loop
does. One JSON line.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax

from k2jax import configs, sharding
from k2jax.model.batch import to_devices
from k2jax.params.arrays import initial
from k2jax.training.metrics import METRICS, MetricsFile, metrics_to_host, to_line
from k2jax.training.profiling import make_speed
from k2jax.training.recovery import Recovery
from k2jax.training.step import (
    Program,
    State,
    build,
    compute_gradients,
    move_biases,
    split_trainable,
)

STEPS = 2


def bare(program: Program, state: State, batch):
    """The step without any metric but the loss, and without a choice."""
    trainable, fixed = split_trainable(state.params, program.specs)
    grads, aux = compute_gradients(program.objective, trainable, fixed, batch)
    updates, opt = program.tx.update(grads, state.opt, trainable, logit_max=aux.logit_max)
    moved = move_biases(program.run, program.specs, fixed, aux.load)
    return State(optax.apply_updates(trainable | fixed, updates | moved), opt), aux.metrics["loss"]


def rows(run) -> dict[str, np.ndarray]:
    """Random tokens, one document a row."""
    shape = (run.data.rows, run.data.context)
    tokens = np.random.default_rng(0).integers(0, run.model.vocab, shape, np.int32)
    ones = np.ones(shape, np.int32)
    return {
        "tokens": tokens,
        "targets": tokens,
        "segments": ones,
        "weights": ones.astype(np.float32),
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }


def main(rounds: int) -> None:
    """Measure and print the line."""
    run = configs.load("tiny")
    jax.config.update("jax_num_cpu_devices", run.mesh.devices)
    with jax.set_mesh(sharding.make_mesh(run.mesh)), tempfile.TemporaryDirectory() as folder:
        program, batch = build(run), to_devices(rows(run), 1)
        params = initial(program.specs, 0, run.model.init_std)
        plain = jax.jit(lambda s, b: bare(program, s, b), donate_argnums=0)
        guarded = jax.jit(program.step, donate_argnums=0)
        recovery, speed = Recovery(run, Path(folder), lambda line: None), make_speed(run)
        file = MetricsFile(Path(folder) / METRICS, 0, print)
        host = []
        # Copies: each step donates its own state.
        states = {k: jax.jit(program.init)(params) for k in ("bare", "guarded", "whole")}

        def take(kind: str, number: int) -> None:
            if kind == "bare":
                states[kind], loss = plain(states[kind], batch)
                float(loss)  # a loop without it would run ahead of the devices
                return
            states[kind], found = guarded(states[kind], batch, np.float32(np.inf))
            if kind == "guarded":
                float(found["loss"])
                return
            jax.block_until_ready(found)
            began = time.thread_time()
            values = metrics_to_host(found) | speed.compute_rates(1.0, 0.0)
            applied = recovery.count_applied(number, recovery.judge(number, values))
            file.write(
                to_line(number, values | {"learning_rate": float(program.schedule(applied))})
            )
            host.append(time.thread_time() - began)

        for kind in states:
            take(kind, 1)
        seconds, cpu = ({kind: [] for kind in states} for _ in range(2))
        number = 1
        for turn in range(rounds):
            order = list(states)[turn % 3 :] + list(states)[: turn % 3]
            for kind in order:
                began, used = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    number += 1
                    take(kind, number)
                seconds[kind].append((time.perf_counter() - began) / STEPS)
                cpu[kind].append((time.process_time() - used) / STEPS)
    result = {"bench": "health", "rounds": rounds, "steps_a_round": STEPS}
    result["host_seconds"] = round(statistics.median(host), 5)
    for name, found in (("seconds", seconds), ("cpu_seconds", cpu)):
        middle = {kind: statistics.median(values) for kind, values in found.items()}
        result[name] = {kind: round(value, 4) for kind, value in middle.items()}
        result[f"{name}_over_bare"] = {
            # Of each round by itself: what slows the machine slows all three.
            kind: round(
                statistics.median(
                    a / b - 1 for a, b in zip(found[kind], found["bare"], strict=True)
                ),
                4,
            )
            for kind in ("guarded", "whole")
        }
    print(json.dumps(result | {"load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
