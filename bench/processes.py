"""One run in 1 and in 4 processes on the same 8 devices.

`python bench/processes.py [steps] [--section.field VALUE ...]`: `k2jax train tiny` for 50 steps,
seed and data alike: once in one process, once in four of two devices each, over loopback, and once
in one process with the batch over all devices, which adds the same numbers in another order: what
rounding alone does to such a run. Prints one JSON line: the largest difference of the losses from
the first run's at step 1, over 10 steps and over all, and how many choices of experts went
elsewhere (half the sum of |difference of expert_load|: a lower bound of the tokens' choices that
changed).
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
THREADS = 8  # what one process of 8 devices has anyway
FAR = 1e-3


def train(out: Path, processes: int, steps: int, settings: list[str]) -> float:
    """Run it; seconds."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = f"127.0.0.1:{found.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "k2jax.cli",
        "train",
        "tiny",
        "--out",
        str(out),
        "--train.steps",
        str(steps),
        "--train.eval_every",
        "0",
        "--train.save_every",
        str(steps),
        *settings,
    ]
    # XLA's CPU products split their sums by the threads of a process: as many in every process.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(THREADS)}
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
    mesh = ["--mesh.data", "2", "--mesh.expert", "2", "--mesh.model", "2"]
    order = ["--mesh.data", "8", "--mesh.expert", "1", "--mesh.model", "1"]
    runs = {"one": (1, mesh), "processes": (PROCESSES, mesh), "other_order": (1, order)}
    with tempfile.TemporaryDirectory() as folder:
        seconds, lines = {}, {}
        for name, (processes, more) in runs.items():
            out = Path(folder, name)
            seconds[name] = round(train(out, processes, steps, settings + more), 1)
            lines[name] = metrics(out)
    result = {"bench": "processes", "processes": PROCESSES, "steps": steps}
    result["settings"] = " ".join(settings)
    for name in ("processes", "other_order"):
        result[name] = apart(lines["one"], lines[name])

    def median(found):
        return round(float(np.median([line["seconds"] for line in found[1:]])), 3)

    result["step_seconds_median"] = {name: median(found) for name, found in lines.items()}
    print(json.dumps(result | {"run_seconds": seconds}))


def apart(one: list[dict], other: list[dict]) -> dict:
    """How far two runs are from each other."""
    losses, loads = (
        np.array([[line[key] for line in lines] for lines in (one, other)])
        for key in ("loss", "expert_load")
    )
    loss = np.abs(losses[0] - losses[1])
    flips = np.abs(loads[0] - loads[1]).sum(axis=(1, 2)) // 2
    far = np.flatnonzero(loss > FAR)
    return {
        "loss_step_1": float(loss[0]),
        "loss_10_steps": float(loss[:10].max()),
        "loss_all_steps": float(loss.max()),
        "loss_by_step": [float(f"{value:.1e}") for value in loss],
        f"first_step_over_{FAR}": int(far[0]) + 1 if far.size else None,
        "choices_a_step": int(loads[0, 0].sum()),
        "flips_step_1": int(flips[0]),
        "flips_10_steps": int(flips[:10].sum()),
        "flips_all_steps": int(flips.sum()),
    }


if __name__ == "__main__":
    first, *rest = [*sys.argv[1:], ""]
    given = first.isdecimal()
    main(int(first) if given else 50, [word for word in (rest if given else sys.argv[1:]) if word])
