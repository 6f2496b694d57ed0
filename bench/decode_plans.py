"""Formulas of inference beside the compilers: `python bench/decode_plans.py [N] [SEED] [WEIGHTS]`.

Draws N cases at random: a config, one of its targets, one of the meshes for inference that divide
it, rows a device, tokens of cache, and whether it decodes or reads prompts; of those that fit by
the formulas. Compiles each for its target (needs the extra `plan`; under a minute each) and prints
one JSON line a case with the signed errors, (formula - compiler) / compiler, of memory and of bytes
sent. WEIGHTS (bf16, fp8, int4) fixes the form of the weights; default: drawn too.
"""

import json
import os
import random
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from k2jax import configs
from k2jax.planner import targets
from k2jax.planner.compile_call import compile_call
from k2jax.planner.decoding import WEIGHTS, Call, Decode, decode, divides, prompt_call
from k2jax.planner.search import meshes
from k2jax.planner.traffic import total

MIDDLE = ("v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x2", "h100:1x8", "h200:1x8", "b200:1x8")
LARGE = ("v5p:4x4x4", "v5p:4x4x8", "v6e:8x16", "tpu7x:2x4x4", "h100:8x8", "h200:4x8", "b200:2x8")
TARGETS = {"moonlight_16b_a3b": MIDDLE, "deepseek_v3": LARGE, "kimi_k2": LARGE}


def draw(count: int, seed: int, weights: str = "") -> list[tuple[str, Decode]]:
    """Different cases that fit, the same for the same seed."""
    dice, cases = random.Random(seed), []
    while len(cases) < count:
        name = dice.choice(sorted(TARGETS))
        cfg, target = configs.load(name).model, targets.parse(dice.choice(TARGETS[name]))
        mesh = dice.choice([m for m in meshes(target.devices, {}) if divides(cfg, m, target)])
        rows, context = dice.choice((1, 2, 8, 16)), dice.choice((2048, 4096, 8192))
        form = WEIGHTS[weights or dice.choice(sorted(WEIGHTS))]
        call = Call(cfg, mesh, target, rows * target.devices, 1, context, form)
        if dice.random() < 0.5:
            call = prompt_call(call, target.devices * dice.choice((128, 256, 512)))
        if decode(call).fits:
            cases.append((name, decode(call)))
    return cases


def compare(name: str, planned: Decode) -> dict:
    """One line: compile it."""
    call = planned.call
    line = {
        "bench": "decode_plans",
        "config": name,
        "target": call.target.name,
        "mesh": str(call.mesh),
        "weights": call.form,
        "chunks": call.chunks,
        "tokens": call.tokens,
        "context": call.context,
    }
    compiled = compile_call(call)
    pairs = {
        "peak_bytes": (planned.peak, compiled.memory["peak"]),
        "wire_bytes": (total(planned.wire), total(compiled.account.wire)),
    }
    for key, (formula, compiler) in pairs.items():
        line[key] = {"formula": formula, "compiler": compiler}
        line[f"{key}_error"] = round((formula - compiler) / compiler, 3) if compiler else None
    return line | {
        "wire": {"formula": planned.wire, "compiler": compiled.account.wire},
        "largest_collective_bytes": compiled.account.largest,
        "compile_seconds": round(compiled.seconds, 1),
        "host_peak_bytes": compiled.host_peak,
    }


if __name__ == "__main__":
    count, seed, weights = (*sys.argv[1:], *("6", "0", "")[len(sys.argv) - 1 :])
    for case in draw(int(count), int(seed), weights):
        print(json.dumps(compare(*case)), flush=True)
