"""A whole step of RL beside TRL's GRPOTrainer, and sampling alone.

    k2jax train tiny --out runs/tiny
    python bench/rl_peer.py runs/tiny                                  # 64 rows, 21 + 16 tokens
    python bench/rl_peer.py runs/toy --rows 256 --prompt 7 --new 4
    python bench/rl_peer.py runs/tiny --optimizer muonclip             # TRL has AdamW

Both run in a process of their own, in float32 on the same prompts, with the same reward, and take
their steps in turns; prints the medians as one line of JSON. Needs `trl`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
STEP = "step took "  # in front of a worker's JSON
# Idle threads of the one must not take the other's cores.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Measure, or be one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--rows", type=int, default=64, help="samples of a step")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=21, help="tokens, [BOS] included")
    parser.add_argument("--new", type=int, default=16, help="tokens")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muonclip"))
    parser.add_argument("--devices", type=int, default=2, help="that ours emulates")
    parser.add_argument("--steps", type=int, default=8, help="measured ones of each")
    parser.add_argument("--seconds", type=float, default=1000.0, help="stop after so many")
    parser.add_argument("--be", default="", choices=("", "ours", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be:
        {"ours": be_ours, "trl": be_trl}[args.be](args)
        return
    with tempfile.TemporaryDirectory() as name:
        published = Path(name) / "published"
        words = [args.run, str(published), "--to", "hf", "--format", "float32"]
        subprocess.run([sys.executable, "-m", "k2jax.cli", "convert", *words], check=True, stdout=2)
        print(json.dumps(measure(args, published, Path(name))), flush=True)


def measure(args: argparse.Namespace, published: Path, place: Path) -> dict[str, Any]:
    """Let both take steps in turns; what they took."""
    began = time.perf_counter()
    workers = {who: start(who, published, place) for who in ("ours", "trl")}
    steps: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    try:
        for worker in 2 * list(workers.values()):  # the first steps compile and warm up
            take_step(worker)
        while len(steps["trl"]) < args.steps and time.perf_counter() - began < args.seconds:
            for who, worker in workers.items():
                steps[who].append(take_step(worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return sum_up(args, steps)


def sum_up(args: argparse.Namespace, steps: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of seconds, samples a second, and of the ratios of pairs."""
    report: dict[str, Any] = {"bench": "rl_peer"} | {
        name: getattr(args, name) for name in ("rows", "group", "prompt", "new", "optimizer")
    }
    for who, taken in steps.items():
        for name in ("step", "sample"):
            report[f"{who}_{name}_s"] = round(statistics.median(t[name] for t in taken), 4)
        report[f"{who}_samples_s"] = round(args.rows / report[f"{who}_step_s"], 1)
        report[f"{who}_new_tokens"] = round(statistics.median(t["tokens"] for t in taken), 2)
    for name in ("step", "sample"):
        pairs = zip(steps["ours"], steps["trl"], strict=True)
        report[f"{name}_ratio"] = round(statistics.median(b[name] / a[name] for a, b in pairs), 3)
    return report | {"pairs": len(steps["ours"])}


def start(who: str, published: Path, place: Path) -> subprocess.Popen:
    """Start one of the two, in a folder of its own."""
    words = [word for word in sys.argv[1:] if word != sys.argv[1]]
    script = [sys.executable, str(Path(__file__).absolute()), str(published), *words, "--be", who]
    (place / who).mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen(script, cwd=place / who, env=os.environ | QUIET, **pipes)


def take_step(worker: subprocess.Popen) -> dict[str, float]:
    """Have a worker take one step; what it says of it."""
    assert worker.stdin and worker.stdout
    worker.stdin.write("go\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith(STEP):
            return json.loads(line.removeprefix(STEP))
    raise SystemExit("a worker ended; see its lines above")


def wait_for_turn() -> None:
    """Wait until the other one has taken its step."""
    if not sys.stdin.readline():
        sys.exit()


def tell_step(step: float, sample: float, tokens: float) -> None:
    """Report seconds of a step, of its sampling, and new tokens of a sample."""
    print(STEP + json.dumps({"step": step, "sample": sample, "tokens": tokens}), flush=True)


def draw_prompts(encode: Any, length: int, count: int = 256) -> list[str]:
    """Words that have `length` tokens together."""
    draw, prompts = random.Random(0), []
    while len(prompts) < count:
        text = ""
        while len(encode(text)) < length:
            text += "".join(draw.choices(ALPHABET, k=draw.randint(1, 6))) + " "
        if len(encode(text)) == length:
            prompts.append(text)
    return prompts


def reward(reply: str) -> float:
    """1 for an even length: something that samples differ in."""
    return float(len(reply) % 2 == 0)


def be_ours(args: argparse.Namespace) -> None:
    """Train with `k2jax rl`, step by step."""
    from k2jax import configs
    from k2jax.post.environment import SingleTurn
    from k2jax.post.rl import train_rl
    from k2jax.post.rl_config import RlConfig
    from k2jax.runtime import backend
    from k2jax.training.metrics import read_metrics
    from k2jax.weights.source import open_source

    precision = {"ns_dtype": "float32"} if args.optimizer == "muonclip" else {}
    run = configs.configure(
        args.run,
        data={"rows": args.rows, "context": args.prompt + args.new - 1},
        optim={"name": args.optimizer, "learning_rate": 1e-4, "bias_rate": 0.0} | precision,
        train={
            "dtype": "float32",
            "remat": "none",
            "steps": 1000,
            "eval_every": 0,
            "save_every": 1000,
            "log_every": 1,
        },
        mesh={"expert": args.devices},
    )
    backend.prepare(run.mesh.devices)
    tokenizer = open_source(args.run).tokenizer
    prompts = draw_prompts(tokenizer.encode, args.prompt - 1)
    env = SingleTurn("even", args.new, lambda split: prompts, lambda prompt, text: reward(text))

    def say(line: str) -> None:
        if line.startswith("step "):
            last = list(read_metrics(Path("out")))[-1]
            tell_step(last["seconds"], last["sample_seconds"], last["answer_tokens"])
            wait_for_turn()
        else:
            sys.stderr.write(f"{line}\n")

    wait_for_turn()
    train_rl(run, RlConfig(group=args.group), env, "out", init=args.run, say=say)


def be_trl(args: argparse.Namespace) -> None:
    """Train with GRPOTrainer, step by step."""
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(args.run, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.run, dtype=torch.float32)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [tokenizer.bos_token + text for text in draw_prompts(encode, args.prompt - 1)]
    seconds = {"sample": 0.0, "began": 0.0}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn()
            seconds["began"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tell_step(time.perf_counter() - seconds["began"], seconds["sample"], args.new)

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *words: Any, **named: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate_single_turn(*words, **named)
            seconds["sample"] = time.perf_counter() - began
            return made

    settings = GRPOConfig(
        output_dir="out",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=args.rows,
        num_generations=args.group,
        max_completion_length=args.new,
        max_steps=1000,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        temperature=1.0,
        beta=0.0,
        disable_tqdm=True,
        generation_kwargs={"min_new_tokens": args.new},
    )
    # Named: to find a fingerprint, datasets pickles what pyarrow has no name for.
    rows = Dataset(InMemoryTable.from_pydict({"prompt": prompts}), fingerprint="prompts")
    trainer = Timed(
        model,
        lambda completions, **_: [reward(text) for text in completions],
        settings,
        rows,
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
