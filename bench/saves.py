"""Host memory and blocking time of repeated checkpoints: `python bench/saves.py [saves]`.

The state of `tiny` (26M float32 weights and their momentum) on its mesh of emulated devices. A
donating step changes it between saves, as in training. Prints one JSON line.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from k2jax.checkpoint import Checkpoints, preload_orbax
from k2jax.configs import load
from k2jax.model import Kimi
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.runtime import backend as startup
from k2jax.runtime.memory import resident
from k2jax.sharding import make_mesh

EARLY = 5


@functools.partial(jax.jit, donate_argnums=0)
def step(state):
    """Every array a little different, in place."""
    return jax.tree.map(lambda x: x * 0.999, state)


def main(saves: int) -> None:
    """Save `saves` times and print what it took."""
    run = load("tiny")
    startup.prepare(run.mesh.devices)
    preload_orbax().join()
    blocked, whole, memory = [], [], {}
    with jax.set_mesh(make_mesh(run.mesh)), tempfile.TemporaryDirectory() as folder:
        params = initial(specs(Kimi(run.model)), 0, run.model.init_std)
        state = {"params": params, "opt": {"momentum": jax.tree.map(jnp.zeros_like, params)}}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with Checkpoints(folder, keep=2) as checkpoints:
            for number in range(1, saves + 1):
                state = jax.block_until_ready(step(state))
                start = time.perf_counter()
                checkpoints.save(number, state, {"number": number})
                blocked.append(time.perf_counter() - start)
                state = jax.block_until_ready(step(state))
                checkpoints.wait()
                whole.append(time.perf_counter() - start)
                memory[number] = resident()
    print(
        json.dumps(
            {
                "bench": "saves",
                "saves": saves,
                "state_bytes": size,
                f"rss_bytes_after_{EARLY}": memory[EARLY],
                f"rss_bytes_after_{saves}": memory[saves],
                "growth": round(memory[saves] / memory[EARLY] - 1, 4),
                "blocked_seconds_median": round(statistics.median(blocked), 4),
                "blocked_seconds_max": round(max(blocked), 4),
                "save_seconds_median": round(statistics.median(whole), 4),
            }
        )
    )


if __name__ == "__main__":
    main(int(next((a for a in sys.argv[1:] if a.isdecimal()), 50)))
