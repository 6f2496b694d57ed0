"""One run in 1 and in 4 processes on the same 8 devices.

`python bench/processes.py [steps] [--section.field VALUE ...]`: `k2jax train tiny` for 50 steps,
seed and data alike: once in one process, once in four of two devices each, over loopback. Prints
one JSON line: the largest difference of the losses at step 1, over 10 steps and over all, and how
many choices of experts went elsewhere (half the sum of |difference of expert_load|: a lower bound
of the tokens' choices that changed).
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PROCESSES = 4


def train(out: Path, processes: int, steps: int, settings: list[str]) -> float:
    """Run it; seconds."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = f"127.0.0.1:{found.getsockname()[1]}"
    command = [
        sys.executable, "-m", "k2jax.cli", "train", "tiny", "--out", str(out),
        "--train.steps", str(steps), "--train.eval_every", "0", "--train.save_every", str(steps),
        *settings,
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    began = time.perf_counter()
    by_hand = ["--coordinator", address, "--processes", str(processes), "--process"]
    more = [[*by_hand, str(number)] if processes > 1 else [] for number in range(processes)]
    jobs = [
        subprocess.Popen([*command, *words], env=environment, stdout=sys.stderr) for words in more
    ]
    codes = [job.wait() for job in jobs]
    if any(codes):
        sys.exit(f"{processes} processes ended with {codes}")
    return time.perf_counter() - began


def metrics(out: Path) -> list[dict]:
    """The lines of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main(steps: int, settings: list[str]) -> None:
    """Run both and print how far they are apart."""
    with tempfile.TemporaryDirectory() as folder:
        outs = {count: Path(folder, str(count)) for count in (1, PROCESSES)}
        seconds = {
            count: round(train(out, count, steps, settings), 1) for count, out in outs.items()
        }
        one, many = (metrics(out) for out in outs.values())
    loss = np.array([[line["loss"] for line in lines] for lines in (one, many)])
    apart = np.abs(loss[0] - loss[1])
    loads = np.array([[line["expert_load"] for line in lines] for lines in (one, many)])
    flips = np.abs(loads[0] - loads[1]).sum(axis=(1, 2)) // 2
    choices = int(loads[0, 0].sum())
    step = lambda lines: float(np.median([line["seconds"] for line in lines[1:]]))
    print(
        json.dumps(
            {
                "bench": "processes",
                "processes": PROCESSES,
                "steps": steps,
                "settings": " ".join(settings),
                "loss_apart_step_1": float(apart[0]),
                "loss_apart_10_steps": float(apart[:10].max()),
                f"loss_apart_{steps}_steps": float(apart.max()),
                "loss_apart_by_step": [float(f"{value:.1e}") for value in apart[:10]],
                "choices_a_step": choices,
                "flips_step_1": int(flips[0]),
                "flips_10_steps": int(flips[:10].sum()),
                f"flips_{steps}_steps": int(flips.sum()),
                "step_seconds_median": [round(step(one), 3), round(step(many), 3)],
                "run_seconds": list(seconds.values()),
            }
        )
    )


if __name__ == "__main__":
    first, *rest = [*sys.argv[1:], ""]
    given = first.isdecimal()
    main(int(first) if given else 50, [word for word in (rest if given else sys.argv[1:]) if word])
