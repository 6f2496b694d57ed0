"""Formulas beside the compilers on triples nobody chose: `python bench/triples.py [N] [SEED]`.

Draws N (config, target, mesh) at random: a config, one of its targets, then one of all meshes that
divide it and fit by the formulas with one row of the config's context for each device that takes
rows. Compiles each whole training step for its target (needs the extra `plan`; a minute for `tiny`,
ten for the largest) and prints one JSON line a triple: what formula and compiler say of memory and
of bytes sent, and the signed errors, (formula - compiler) / compiler.
"""

import json
import os
import random
import subprocess
import sys
import time

from k2jax import configs
from k2jax.config import MeshConfig, RunConfig, override
from k2jax.planner import targets
from k2jax.planner.estimate import estimate
from k2jax.planner.partition import indivisible_axis
from k2jax.planner.search import meshes
from k2jax.planner.traffic import total

SMALL = ("v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1", "h100:1x8", "h200:1x8", "b200:1x8")
MIDDLE = ("v5p:4x4x4", "v6e:8x8", "tpu7x:2x4x4", "h100:8x8", "h200:4x8", "b200:2x8")
LARGE = ("v5p:8x8x16", "tpu7x:4x8x8", "h100:128x8", "h200:32x8", "b200:32x8")
TARGETS = {
    "tiny": SMALL,
    "small": SMALL,
    "moonlight_16b_a3b": MIDDLE,
    "deepseek_v3": LARGE,
    "kimi_k2": LARGE,
}


def settings(mesh: MeshConfig) -> dict[str, str]:
    """One row for each device that takes rows; gradients as they come."""
    rows = mesh.replica * mesh.data * mesh.expert
    return {
        "data.rows": str(rows),
        "train.accumulate": "1",
        "train.grad_dtype": "bfloat16",
    }


def valid(run: RunConfig, target: targets.Target) -> list[MeshConfig]:
    """Meshes that divide the run, and fit by the formulas."""
    found = []
    for mesh in meshes(target.devices, {}):
        if indivisible_axis(run.model, mesh, run.data.context) or mesh.replica > 1:
            continue
        if estimate(override(run, settings(mesh)), mesh, 1, target).fits:
            found.append(mesh)
    return found


def drawn(count: int, seed: int) -> list[tuple[str, str, MeshConfig]]:
    """Different triples, the same for the same seed."""
    dice, found = random.Random(seed), []
    while len(found) < count:
        name = dice.choice(sorted(TARGETS))
        target = dice.choice(TARGETS[name])
        choices = valid(configs.load(name), targets.parse(target))
        triple = (name, target, dice.choice(choices)) if choices else None
        if triple and triple not in found:
            found.append(triple)
    return found


def compared(name: str, target: str, mesh: MeshConfig) -> dict:
    """One line: compile it."""
    words = [f"--{key}={value}" for key, value in settings(mesh).items()]
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.sizes.items())
    command = [
        sys.executable,
        "-m",
        "k2jax.cli",
        "plan",
        name,
        "--target",
        target,
        "--mesh",
        axes,
        *words,
        "--compile",
        "--json",
    ]
    began = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    line = {"bench": "triples", "config": name, "target": target, "mesh": axes}
    if done.returncode not in (0, 1) or not done.stdout:
        return line | {"failed": done.stderr.strip()[-300:]}
    found = json.loads(done.stdout)
    pairs = {
        "peak_bytes": [d["bytes_per_device"]["peak"] for d in (found["formulas"], found)],
        "wire_bytes": [total(d["wire_bytes_per_device"]) for d in (found["formulas"], found)],
    }
    for key, (formula, compiler) in pairs.items():
        line[key] = {"formula": formula, "compiler": compiler}
        line[f"{key}_error"] = round((formula - compiler) / compiler, 3) if compiler else None
    line["wire"] = {
        "wire_bytes_per_device": found["wire_bytes_per_device"],
        "formulas": found["formulas"]["wire_bytes_per_device"],
    }
    return line | {"seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    count, seed = (*map(int, sys.argv[1:]), *(6, 0)[len(sys.argv) - 1 :])
    for triple in drawn(count, seed):
        print(json.dumps(compared(*triple)), flush=True)
