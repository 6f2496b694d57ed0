"""Print one digest of what must not move when code moves: losses, a resume, greedy tokens.

    python bench/digest.py [STEPS]

Trains `tiny` for STEPS (20) steps on one device and on 8, resumes the latter from half-way, and
continues five prompts, all by the command line, so that the same script runs at any commit. Two
commits whose `digest` is equal computed the same bits on this machine.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS = ("import os", "def main():", "class Tree:", "# the", "for i in range(")
ONE_DEVICE = ("--mesh.data", "1", "--mesh.expert", "1", "--mesh.model", "1")
EIGHT_DEVICES = ("--mesh.data", "2", "--mesh.expert", "2", "--mesh.model", "2")
KEYS = ("loss", "grad_norm", "update_norm", "logit_max", "load_max")


def k2jax(*words: str) -> str:
    """Run a command; what it prints."""
    command = [sys.executable, "-m", "k2jax.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.stdout


def train(out: Path, steps: int, *words: str) -> list[list[float]]:
    """Train `tiny`; the metrics of every step."""
    settings = {"steps": steps, "save_every": steps // 2, "keep": 2, "eval_every": 0}
    flags = [word for name, n in settings.items() for word in (f"--train.{name}", str(n))]
    k2jax("train", "tiny", "--out", str(out), *flags, *words)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in KEYS] for line in lines]


def main() -> int:
    """Print the line."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        one = train(Path(folder) / "one", steps, *ONE_DEVICE)
        mesh = Path(folder) / "mesh"
        eight = train(mesh, steps, *EIGHT_DEVICES)
        shutil.rmtree(mesh / "checkpoints" / str(steps))
        resumed = train(mesh, steps, *EIGHT_DEVICES)
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        text = k2jax("generate", str(mesh), *prompts, "--json")
    samples = [sample["ids"] for sample in json.loads(text)["samples"]]
    parts = {"one": one, "eight": eight, "resumed": resumed, "samples": samples}
    sums = [hashlib.sha256(json.dumps(part).encode()).hexdigest()[:8] for part in parts.values()]
    line = {
        "bench": "digest",
        "steps": steps,
        "digest": "-".join(sums),
        "resumed_equal": resumed == eight,
        "loss": {"one": one[-1][0], "eight": eight[-1][0]},
        "seconds": round(time.perf_counter() - began),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
