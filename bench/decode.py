"""Greedy decoding of `tiny`, tokens/s: `python bench/decode.py [runs]`; prints one JSON line.

128 tokens of prompt and 128 new ones, batch 1 and 8, a vocabulary of 4,096, float32, random
weights, two CPU cores. Prompt and new tokens are timed together; a rate counts the new ones. Where
torch and transformers are installed (extra `parity`), their `DeepseekV3ForCausalLM.generate` of the
same size takes turns with ours, so that both see the same machine.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import k2jax
from k2jax.config import ModelConfig
from k2jax.configs import load
from k2jax.model import Kimi, Model
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.weights.hf_config import PUBLISHED

PROMPT, NEW, BATCHES, CORES, VOCAB = 128, 128, (1, 8), 2, 4_096


def ours(cfg: ModelConfig) -> Callable[[np.ndarray], int]:
    """Decodes a batch of prompts; returns the number of new tokens."""
    model = Model(cfg, initial(specs(Kimi(cfg)), 0, cfg.init_std))
    return lambda prompts: sum(map(len, k2jax.generate(model, prompts, NEW, stop=())))


def transformers(cfg: ModelConfig) -> Callable[[np.ndarray], int]:
    """The same by transformers, with its own random weights."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(CORES)
    fields = {theirs: getattr(cfg, name) for name, theirs in PUBLISHED.items()}
    config = DeepseekV3Config(
        **fields,
        num_hidden_layers=cfg.layers,
        q_lora_rank=cfg.q_rank,
        n_group=cfg.groups,
        n_shared_experts=cfg.shared_experts,
        topk_group=cfg.groups_per_token,
        num_key_value_heads=cfg.heads,
        rope_theta=cfg.rope_theta,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    assert sum(p.numel() for p in model.parameters()) == _parameters(cfg)

    def decode(prompts: np.ndarray) -> int:
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
            )
        return out.numel() - prompts.size

    return decode


def _parameters(cfg: ModelConfig) -> int:
    leaves = specs(Kimi(cfg)).values()
    return sum(int(np.prod(leaf.shape)) for leaf in leaves if leaf.group != "bias")


def main(runs: int) -> None:
    """Time both in turns and print the medians."""
    if hasattr(os, "sched_setaffinity"):  # before JAX counts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    cfg = dataclasses.replace(load("tiny").model, vocab=VOCAB)
    peers = {"k2jax": ours(cfg)}
    with contextlib.suppress(ImportError):
        peers["transformers"] = transformers(cfg)
    result: dict[str, object] = {"bench": "decode", "runs": runs, "jax": jax.__version__}
    for batch in BATCHES:
        prompts = np.random.default_rng(batch).integers(0, cfg.vocab, (batch, PROMPT))
        rates: dict[str, list[float]] = {name: [] for name in peers}
        for run in range(runs + 1):
            for name, decode in peers.items():
                began = time.perf_counter()
                new = decode(prompts)
                seconds = time.perf_counter() - began
                assert new == batch * NEW
                if run:  # the first compiles
                    rates[name].append(new / seconds)
        medians = {name: statistics.median(found) for name, found in rates.items()}
        result |= {f"{name}_tokens_per_s_batch_{batch}": round(r, 1) for name, r in medians.items()}
        if len(medians) > 1:
            ratio = medians["k2jax"] / medians["transformers"]
            result[f"ratio_batch_{batch}"] = round(ratio, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
