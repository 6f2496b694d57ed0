"""Merge an adapter into a full-size INT4 layer: `python bench/merge.py [EXPERTS] [DIR]`.

Makes a folder whose one MoE layer has the exact tensors of a K2-Thinking layer at full width
(random words, plausible scales; EXPERTS of its 384 experts, the vocabulary cut to 128 tokens), and
an adapter of rank 8 for its attention, shared and routed experts. Merges it into INT4 again and
audits every tensor, in a process of its own. Prints one JSON line; the goal is at most 3 GB of
anonymous memory. 384 experts need 21 GB of disk.
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from convert import GB, POOL, measured

from k2jax.config import LoraConfig
from k2jax.configs import load
from k2jax.conversion.hf_files import INT4_CONFIG, LAYER
from k2jax.params.adapters import declare_adapters
from k2jax.params.kimi import declare_kimi
from k2jax.weights import quant
from k2jax.weights.adapter_files import write_peft
from k2jax.weights.hf_config import to_published
from k2jax.weights.hf_folder import INDEX
from k2jax.weights.releases import RELEASES, published_tensors
from k2jax.weights.safetensors import stream

GOAL_GB = 3.0
LORA = LoraConfig(rank=8, alpha=16.0, targets="attention,shared,experts")


def make_layer(folder: Path, experts: int) -> dict:
    """Write the folder of weights; declarations of its parameters."""
    model = load("kimi_k2_thinking").model
    model = dataclasses.replace(model, dense_layers=0, moe_layers=1, vocab=128, experts=experts)
    kinds = published_tensors(declare_kimi(model), RELEASES["kimi_k2_thinking"])
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**32, POOL // 4, np.uint32).view(np.int32)

    def pieces(name):
        dtype, shape = kinds[name]
        if name.endswith("_shape"):
            packed = kinds[name.removesuffix("_shape") + "_packed"][1]
            return [np.array([packed[0], packed[1] * quant.PER_WORD], dtype)]
        if name.endswith("_packed"):
            at = int(rng.integers(len(pool) - math.prod(shape)))
            return [pool[at : at + math.prod(shape)].reshape(shape)]
        deviation = 1e-3 if name.endswith("_scale") else 2e-2
        values = rng.standard_normal(shape, np.float32) * np.float32(deviation)
        return [(np.abs(values) if name.endswith("_scale") else values).astype(dtype)]

    held = {n: "layer.safetensors" if LAYER.match(n) else "rest.safetensors" for n in kinds}
    for file in sorted(set(held.values())):
        stream(folder / file, {n: k for n, k in kinds.items() if held[n] == file}, pieces)
    (folder / INDEX).write_text(json.dumps({"weight_map": held}))
    fields = to_published(model) | {"quantization_config": INT4_CONFIG}
    (folder / "config.json").write_text(json.dumps(fields))
    return declare_kimi(model)


def main(experts: int, root: Path) -> None:
    """Make the weights and the adapter, merge, and print what it took."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        source, adapter = Path(name, "source"), Path(name, "adapter")
        source.mkdir()
        pairs = declare_adapters(make_layer(source, experts), LORA)
        rng = np.random.default_rng(1)
        drawn = {
            name: rng.standard_normal(leaf.shape, np.float32) * np.float32(1e-2)
            for name, leaf in pairs.items()
        }
        write_peft(adapter, drawn, pairs, LORA.rank, LORA.alpha, str(source))
        del drawn
        merged = measured(source, Path(name, "merged"), to="hf", adapter=str(adapter), verify=True)
    report = merged.pop("report")
    line = {"bench": "merge", "experts": experts, "adapted": report["adapted"]}
    line |= {"verified": report["verified"]["tensors"], "gb": round(report["bytes_out"] / GB, 2)}
    line |= {key: round(value, 2) for key, value in merged.items()} | {"goal_gb": GOAL_GB}
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    count, folder = [*sys.argv[1:], *["384", tempfile.gettempdir()][len(sys.argv) - 1 :]][:2]
    main(int(count), Path(folder))
