"""Low-bit weights beside bfloat16: `python bench/lowbit.py [--form int4] [--pairs 5]`.

Random weights of `small` are written as a release publishes them, loaded twice, once as they are
and once decoded, and continue the same prompt greedily at batch 1 in turns. One JSON line: tokens a
second of each, the median ratio of the pairs, bytes in memory and in the files.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

import k2jax
from k2jax import configs
from k2jax.config import ModelConfig
from k2jax.params.arrays import initial
from k2jax.params.kimi import declare_kimi
from k2jax.params.low_bit_parts import is_released_in
from k2jax.weights import quant
from k2jax.weights.hf_config import to_published as to_config
from k2jax.weights.mapping import to_published
from k2jax.weights.safetensors import write

PROMPT = 32  # tokens


def make_release(folder: Path, cfg: ModelConfig, form: str) -> None:
    """Write a published folder with random weights."""
    specs, tensors = declare_kimi(cfg), {}
    for name, spec in specs.items():
        params = {name: np.asarray(initial({name: spec}, 0, 0.02)[name])}
        low = is_released_in(spec, form)
        for key, weight in to_published(params, {name: spec}, ml_dtypes.bfloat16):
            if not low:
                tensors[key] = weight
            elif form == "fp8":
                tensors[key], tensors[f"{key}_scale_inv"] = quant.encode_fp8(weight)
            else:
                tensors[f"{key}_packed"], tensors[f"{key}_scale"] = quant.encode_int4(weight)
                tensors[f"{key}_shape"] = np.array(weight.shape, np.int32)
    write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_config(cfg)))


def measure(folder: Path, tokens: int, pairs: int) -> dict[str, object]:
    """Generate in turns."""
    models = {way: k2jax.load(folder, weights=way) for way in ("stored", "decoded")}
    prompt = np.random.default_rng(1).integers(0, models["stored"].config.vocab, PROMPT).tolist()

    def run(way: str, new: int = tokens) -> tuple[float, float, list[int]]:
        began, cpu = time.perf_counter(), time.process_time()
        ids = k2jax.generate(models[way], [prompt], new, stop=())[0]
        return time.perf_counter() - began, time.process_time() - cpu, ids

    seconds: dict[str, list[tuple[float, float, list[int]]]] = {way: [run(way)] for way in models}
    for way in models:
        seconds[way].clear()
    for pair in range(pairs):
        for way in sorted(models, reverse=bool(pair % 2)):
            seconds[way].append(run(way))
    ratios = [
        [decoded[at] / stored[at] for stored, decoded in zip(*seconds.values(), strict=True)]
        for at in (0, 1)
    ]
    return {
        "tokens_per_second": {
            way: round(tokens / statistics.median(s for s, _, _ in runs), 1)
            for way, runs in seconds.items()
        },
        "stored_over_decoded": round(statistics.median(ratios[0]), 3),
        "stored_over_decoded_by_cpu_time": round(statistics.median(ratios[1]), 3),
        "same_tokens": seconds["stored"][0][2] == seconds["decoded"][0][2],
        "resident_bytes": {
            way: sum(a.nbytes for a in jax.tree.leaves(model.params))
            for way, model in models.items()
        },
        "file_bytes": (folder / "model.safetensors").stat().st_size,
    }


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="small")
    parser.add_argument("--form", choices=("int4", "fp8"), default="int4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    k2jax.prepare()
    with tempfile.TemporaryDirectory() as name:
        make_release(Path(name), configs.load(args.config).model, args.form)
        line = measure(Path(name), args.tokens, args.pairs)
    print(json.dumps({"bench": "lowbit", **vars(args)} | line))


if __name__ == "__main__":
    main()
