"""Host memory and page faults of a training run on CPU: `python bench/memory.py [STEPS]`.

Trains a small model for STEPS (500) steps on two emulated devices, scored every 25 steps and saved
every 50. Prints one JSON line: page faults of a step, and resident memory after the first tenth of
the steps, after all of them, and at its largest in between.
"""

import itertools
import json
import os
import resource
import statistics
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from k2jax.commands.train import train
from k2jax.training.metrics import read_metrics

MODEL = {
    "vocab": 4_096,
    "embed": 128,
    "dense_layers": 1,
    "moe_layers": 1,
    "heads": 4,
    "q_rank": 48,
    "kv_rank": 32,
    "nope": 32,
    "rope": 16,
    "value": 32,
    "ffw": 352,
    "experts": 8,
    "expert_ffw": 64,
    "experts_per_token": 2,
    "context": 256,
}


def main(steps: int) -> None:
    """Train, and print what it took."""
    after: list[int] = []  # page faults of this process after each step

    def say(line: str) -> None:
        if line.startswith(("first step", "step ")):
            after.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": MODEL,
            "mesh": {"data": 1, "expert": 2, "model": 1},
            "train": {"steps": steps, "eval_every": 25, "save_every": 50, "log_every": 1},
        }
        train("tiny", folder, say=say, **settings)
        resident = [line["host_bytes"] for line in read_metrics(folder)]
    faults = [later - earlier for earlier, later in itertools.pairwise(after)]
    early = steps // 10
    line = {
        "bench": "memory",
        "steps": steps,
        "faults_median": statistics.median(faults[early:]),
        "faults_mean": round(statistics.mean(faults[early:]), 1),
        f"rss_bytes_after_{early}": resident[early - 1],
        f"rss_bytes_after_{steps}": resident[-1],
        "growth": round(resident[-1] / resident[early - 1] - 1, 4),
        "growth_at_most": round(max(resident[early:]) / resident[early - 1] - 1, 4),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
