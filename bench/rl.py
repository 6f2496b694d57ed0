"""Reinforcement learning of `toy` on two CPU cores: `python bench/rl.py [TASK [SEED [STEPS]]]`.

TASK is sum2 or sort6. The model learns from right answers first, ten steps at a time until its
sampled accuracy on held-out prompts is that of `ENOUGH`, then from rewards alone; prints one JSON
line. With `control` as the last word the rewards of RL are shuffled. `bench/rl.py kills [N]`
instead kills a run N times (default 10) at random moments, and compares the last weights of each
run that comes to its end with those of one left alone.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from k2jax import configs
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings
from k2jax.post.environment import open_environment
from k2jax.post.rl import train_rl
from k2jax.post.rl_config import RlConfig
from k2jax.post.rollouts import Sampler
from k2jax.post.samples import hold_scores
from k2jax.post.toy_tasks import write_examples
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics
from k2jax.weights.source import load

# Sampled accuracy to begin RL with. Ten steps more and sorting is at 0.7, which leaves little.
ENOUGH = {"sum2": 0.4, "sort6": 0.2}
FIRST = {"sum2": 120, "sort6": 40}  # supervised steps before the first look
STEPS = {"sum2": 500, "sort6": 150}  # of RL


def say(line: str) -> None:
    """Print a line to stderr."""
    sys.stderr.write(f"{line}\n")


def supervise(task: str, seed: int, folder: Path) -> tuple[Path, dict[str, float]]:
    """Train on right answers until enough of the samples are right; the folder and scores."""
    path = write_examples(task, str(folder))
    run = configs.configure("toy", data={"path": str(path), "seed": seed}, train={"seed": seed})
    steps, out = FIRST[task], folder / "sft"
    while True:
        now = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))
        model = train(now, out, say=lambda _: None)
        engine = Engine(model, EngineSettings(rows=256, cache_tokens=256 * 64, prefill_share=1.0))
        sampler = Sampler(engine, model.tokenizer, open_environment(task))
        scores = hold_scores(sampler, RlConfig(), seed)
        say(f"supervised step {steps}: {scores}")
        if scores["heldout_sampled"] >= ENOUGH[task]:
            return out, scores
        steps += 10


def learn(task: str, seed: int, steps: int, control: str) -> dict[str, object]:
    """Run both stages; what they reached."""
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        init, before = supervise(task, seed, folder)
        supervised = time.perf_counter() - began
        run = configs.configure(
            "toy_rl", data={"seed": seed}, train={"steps": steps or STEPS[task]}
        )
        rl, out, began = RlConfig(control=control), folder / "rl", time.perf_counter()
        train_rl(run, rl, open_environment(task), out, init=str(init), say=say)
        whole = time.perf_counter() - began
        lines = list(read_metrics(out))
    speeds = sorted(line["samples_per_second"] for line in lines[5:])
    stepping = sum(line["seconds"] for line in lines[1:])
    return {
        "bench": "rl",
        "task": task,
        "seed": seed,
        "control": control,
        "supervised": before,
        "supervised_s": round(supervised, 1),
        "after": {k: v for k, v in lines[-1].items() if k.startswith("heldout_")},
        "steps": len(lines),
        "rl_s": round(whole, 1),
        "steps_s": round(stepping, 1),
        "samples_s": round(speeds[len(speeds) // 2], 1),
        "sampler_max": max(line["sampler_max"] for line in lines),
        "sampler_above_1e-5": sum(line["sampler_max"] > 1e-5 for line in lines) / len(lines),
        "log_ratio": max(line["log_ratio"] for line in lines),
    }


def kill(times: int) -> dict[str, object]:
    """Kill a short run at random moments, and compare its last weights with an unkilled one's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init, _ = supervise("sum2", 0, folder)
        words = [sys.executable, "-m", "k2jax.cli", "rl", "toy_rl", "--init", str(init)]
        words += ["--env", "sum2", "--train.steps", "60", "--train.save_every", "5"]
        words += ["--train.eval_every", "0", "--rl.eval_prompts", "8"]
        began = time.perf_counter()
        subprocess.run([*words, "--out", str(folder / "whole")], check=True, stdout=2)
        whole = time.perf_counter() - began
        right, killed, ended = load(folder / "whole").params, 0, []
        while killed < times or (folder / "killed").exists():
            with subprocess.Popen([*words, "--out", str(folder / "killed")], stdout=2) as process:
                try:
                    limit = random.uniform(0.3, 1.0) * whole if killed < times else None
                    if process.wait(limit):
                        raise RuntimeError(f"the command ended with {process.returncode}")
                except subprocess.TimeoutExpired:
                    process.kill()
                    killed += 1
                    say(f"kill {killed}")
                    continue
            params = load(folder / "killed").params
            ended.append(all(np.array_equal(params[key], right[key]) for key in right))
            say(f"equal at the end: {ended[-1]}")
            shutil.rmtree(folder / "killed")  # once more from the start
    line = {"bench": "rl", "kills": killed, "runs": len(ended), "equal": sum(ended)}
    return line | {"seconds_whole": round(whole, 1)}


def main() -> None:
    """Run what the command line names."""
    words = sys.argv[1:]
    if words[:1] == ["kills"]:
        print(json.dumps(kill(int(words[1]) if words[1:] else 10)), flush=True)
        return
    control = "shuffled_rewards" if "control" in words else "none"
    words = [word for word in words if word != "control"]
    task, seed, steps = words + ["sum2", "0", "0"][len(words) :]
    print(json.dumps(learn(task, int(seed), int(steps), control)), flush=True)


if __name__ == "__main__":
    main()
