"""One Muon update of ours beside optax's, in one run: one JSON line.

    python bench/optimizer.py [REPEATS]

Float32 on one device, jitted, state donated. An expert stack [32, 512, 2048], and the `tiny` model
with its embeddings and gains under Adam. Variants take turns, so that other work on the machine
falls on all of them; the least of their times is reported, in wall and in CPU seconds. Differences
are the largest of any entry of a matrix's update over 0.2 lr, what such entries have at full rank
(optax's Adam group is Nesterov's, so that the others do not coincide).
"""

import json
import os
import platform
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from k2jax.configs import load
from k2jax.model import Kimi
from k2jax.optim import Matrices, muonclip
from k2jax.optim.newton_schulz import RESTARTS
from k2jax.params.arrays import initial
from k2jax.params.declare import specs

RATE, DECAY = 1e-2, 0.1
STACK = (32, 512, 2048)


def theirs(dims: dict[str, tuple | None]) -> optax.GradientTransformation:
    """Muon of optax with the recipe's settings; `dims` are rows and columns, None: Adam's."""
    axes = {n: d and optax.contrib.MuonDimensionNumbers(*d) for n, d in dims.items()}
    return optax.contrib.muon(
        RATE,
        weight_decay=DECAY,
        adam_b2=0.95,
        adam_weight_decay=DECAY,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=axes,
    )


def ours(leaves, **settings) -> optax.GradientTransformation:
    """MuonClip without the clipping."""
    return muonclip(RATE, specs=leaves, weight_decay=DECAY, ns_dtype="float32", **settings)


def stack() -> tuple:
    """One leaf of experts."""
    w = np.random.default_rng(0).standard_normal(STACK, np.float32)
    return {"w": jnp.asarray(w)}, {"w": Matrices((1,), (2,), (0,))}, {"w": ((1,), (2,))}


def tiny() -> tuple:
    """All weights of `tiny` but the router biases."""
    run = load("tiny")
    leaves = {n: leaf for n, leaf in specs(Kimi(run.model)).items() if leaf.group != "bias"}
    dims = {
        n: (
            tuple(range(leaf.stacked, leaf.stacked + leaf.contracted)),
            tuple(range(leaf.stacked + leaf.contracted, len(leaf.axes))),
        )
        if leaf.group == "muon"
        else None
        for n, leaf in leaves.items()
    }
    return initial(leaves, 0, run.model.init_std), leaves, dims


def measure(make, repeats: int) -> dict[str, dict[str, float]]:
    """Times and differences of each variant on one problem."""
    params, leaves, dims = make()
    grads = jax.tree.map(lambda p: p * 3.0, params)
    variants = {
        "optax": theirs(dims),
        "standard": ours(leaves),
        "gram_restart": ours(leaves, gram=RESTARTS),
        "gram": ours(leaves, gram=()),
    }
    run, found = {}, {name: {"seconds": np.inf, "cpu_seconds": np.inf} for name in variants}
    right = None
    for name, tx in variants.items():
        state = jax.jit(tx.init)(params)
        began = time.process_time()
        update = jax.jit(tx.update, donate_argnums=1).lower(grads, state, params).compile()
        found[name]["compile_cpu_seconds"] = round(time.process_time() - began, 2)
        updates, state = update(grads, state, params)
        right = updates if right is None else right
        gap = max(float(jnp.abs(updates[n] - right[n]).max()) for n, d in dims.items() if d)
        found[name]["difference"] = gap / (0.2 * RATE)
        run[name] = update, state
    for _ in range(repeats):
        for name, (update, old) in run.items():
            wall, cpu = time.perf_counter(), time.process_time()
            updates, state = jax.block_until_ready(update(grads, old, params))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            run[name] = update, state
            best = found[name]
            best["seconds"] = min(best["seconds"], round(wall, 4))
            best["cpu_seconds"] = min(best["cpu_seconds"], round(cpu, 4))
    for best in found.values():
        best["speedup"] = round(found["optax"]["seconds"] / best["seconds"], 3)
        best["cpu_speedup"] = round(found["optax"]["cpu_seconds"] / best["cpu_seconds"], 3)
    return found


def main() -> None:
    """Measure and print."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    versions = {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
    }
    print(
        json.dumps(
            {"bench": "optimizer", "repeats": repeats}
            | versions
            | {"stack": measure(stack, repeats), "tiny": measure(tiny, repeats)}
        )
    )


if __name__ == "__main__":
    main()
