"""Training speed of `tiny` with 4,096 tokens beside transformers, in one run: one JSON line.

    python bench/train.py [STEPS]

AdamW, float32, 8 rows of 256 tokens, two threads; the median step, the first two left out. Ours on
one device, on two (`expert=2`, one for each core) and on 8 (data=2 expert=2 model=2), each in its
own process; transformers' `DeepseekV3ForCausalLM` with grouped experts where torch can be imported
(extra `parity`), with malloc as it is and keeping what is freed; the better of the two counts.
"""

import ctypes
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time

ROWS, CONTEXT, VOCAB = 8, 256, 4_096
MESHES: dict[int, dict[str, int]] = {
    1: {},
    2: {"expert": 2},
    8: {"data": 2, "expert": 2, "model": 2},
}


def ours(steps: int, devices: int) -> list[float]:
    """Seconds of each step of ours."""
    import dataclasses

    import jax
    import numpy as np

    jax.config.update("jax_num_cpu_devices", devices)
    from k2jax import configs, sharding
    from k2jax.config import MeshConfig, override
    from k2jax.model.batch import to_devices
    from k2jax.params.arrays import initial
    from k2jax.runtime.memory import limit_malloc_arenas
    from k2jax.training.compile import InReserve, compile_lowered
    from k2jax.training.step import build

    limit_malloc_arenas()
    run = override(configs.load("tiny"), {"optim.name": "adamw", "optim.learning_rate": "1e-3"})
    run = override(run, {"data.rows": str(ROWS), "data.context": str(CONTEXT)})
    run = override(run, {"model.vocab": str(VOCAB)})
    run = dataclasses.replace(run, mesh=MeshConfig(**MESHES[devices]))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, run.model.vocab, (ROWS, CONTEXT + 1), dtype=np.int32)
    ones = np.ones((ROWS, CONTEXT), np.int32)
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        "weights": ones.astype(np.float32),
    }
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        program = build(run)
        state = program.init(initial(program.specs, 0, run.model.init_std))
        batch = to_devices(rows, 1)
        step = jax.jit(program.step, donate_argnums=0)
        step = InReserve(compile_lowered(step.lower(state, batch)))
        seconds = []
        for _ in range(steps):
            batch = to_devices(rows, 1)
            began = time.perf_counter()
            state, _ = step(state, batch)
            seconds.append(time.perf_counter() - began)
    return seconds


def keep_freed() -> None:
    """Let malloc keep all memory that is freed, from its only heap."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # arenas, mmaps, trim threshold
            ctypes.CDLL(None).mallopt(option, value)


def transformers(steps: int) -> list[float]:
    """Seconds of each step of the same model in PyTorch."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=1,
        n_routed_experts=32,
        routed_scaling_factor=2.827,
        kv_lora_rank=64,
        q_lora_rank=96,
        qk_rope_head_dim=16,
        v_head_dim=32,
        qk_nope_head_dim=32,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        max_position_embeddings=256,
        use_cache=False,
        rope_parameters={"rope_theta": 50000.0, "rope_type": "default"},
    )
    model = DeepseekV3ForCausalLM(config).train()
    model.set_experts_implementation("grouped_mm")
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, VOCAB, (ROWS, CONTEXT))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        adam.step()
        adam.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Run each in its own process, one after the other, and print the line."""
    if len(sys.argv) == 3:
        steps, peer = int(sys.argv[1]), sys.argv[2]
        if peer == "transformers_kept":
            keep_freed()
        seconds = transformers(steps) if "transformers" in peer else ours(steps, int(peer))
        print(json.dumps(seconds))
        return
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    peers = {"k2jax_1_device": "1", "k2jax_2_devices": "2", "k2jax_8_devices": "8"}
    if importlib.util.find_spec("torch"):
        peers |= {"transformers": "transformers", "transformers_kept": "transformers_kept"}
    speeds = {}
    for name, peer in peers.items():
        command = [sys.executable, __file__, str(steps), peer]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds = json.loads(shown.splitlines()[-1])[2:]
        speeds[name] = round(ROWS * CONTEXT / statistics.median(seconds), 1)
    line = {"bench": "train", "tokens_per_second": speeds, "steps": steps}
    if best := max((speeds.get(name, 0) for name in peers if "transformers" in name), default=0):
        ours_of = {name: speed for name, speed in speeds.items() if name.startswith("k2jax")}
        line["of_transformers"] = {name: round(v / best, 3) for name, v in ours_of.items()}
    versions = {"python": platform.python_version(), "machine": platform.processor()}
    print(json.dumps(line | versions))


if __name__ == "__main__":
    main()
