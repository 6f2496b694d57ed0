"""Kill `k2jax train` at random moments until it is done: `python bench/faults.py [KILLS] [SEED]`.

A small model on 8 emulated devices with MuonClip that saves every second step, so that most kills
find a save or a deletion at work. Every start is killed (-9) at a moment drawn from the seed: in
one of its phases, or while a file of a save is there. The same command is given again until
it has been killed KILLS times and comes to its end. In the end every loss and every number of the
last checkpoint must be, bit for bit, those of a run that nobody killed. A table, and one JSON line.
"""

import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS_A_LIFE = 8  # about how far a life gets before it is killed
SETTINGS = {
    "model.vocab": 576,
    "model.embed": 32,
    "model.moe_layers": 1,
    "model.heads": 2,
    "model.q_rank": 16,
    "model.kv_rank": 16,
    "model.nope": 8,
    "model.rope": 8,
    "model.value": 8,
    "model.ffw": 64,
    "model.experts": 4,
    "model.expert_ffw": 32,
    "model.experts_per_token": 2,
    "model.context": 32,
    "data.context": 32,
    "data.rows": 8,
    "mesh.data": 2,
    "mesh.expert": 2,
    "mesh.model": 2,
    "train.eval_every": 8,
    "train.eval_rows": 8,
    "train.save_every": 2,
    "train.log_every": 1,
    "train.keep": 2,
}
# A moment is one of these, then a part of a second more.
MOMENTS = ("start", "compile", "step", "save", "delete", "commit")


def texts(folder: Path) -> Path:
    """A corpus of short functions."""
    folder.mkdir()
    for number in range(30):
        words = (f"def f{number}_{i}(x): return x + {i * number}\n" for i in range(20))
        (folder / f"{number}.py").write_text("".join(words))
    return folder


def command(text: Path, out: Path, steps: int) -> list[str]:
    """Train for `steps`."""
    settings = {**SETTINGS, "data.path": text, "train.steps": steps}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "k2jax.cli", "train", "tiny", "--out", str(out), *words]


def names(out: Path) -> set[str]:
    """Of everything in the folder of checkpoints."""
    root = out / "checkpoints"
    return {path.name for path in root.iterdir()} if root.is_dir() else set()


def complete(out: Path) -> list[int]:
    """Steps whose folder has its last name."""
    return sorted(int(name) for name in names(out) if name.isdecimal())


class Life:
    """One start of the command, until it ends or is killed."""

    def __init__(self, words: list[str], out: Path):
        self.out, self.lines, self.steps = out, [], 0
        self.job = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.job.stdout:
            self.lines.append(line.rstrip())
            self.steps += line.startswith("step ")

    def reached(self, moment: str, after: int) -> bool:
        """Whether it is at that moment, `after` steps from its start."""
        if moment in ("start", "compile"):
            return moment == "start" or any("held out" in line for line in self.lines)
        if self.steps < after:
            return False
        there = names(self.out)
        return {
            "step": True,
            "save": any("tmp" in name for name in there),
            "delete": any(name.endswith(".deleted") for name in there),
            "commit": any(name.isdecimal() and int(name) > self.seen for name in there),
        }[moment]

    def kill_at(self, moment: str, after: int, delay: float) -> bool:
        """Whether it was killed before it came to its end."""
        self.seen = max(complete(self.out), default=0)
        while self.job.poll() is None and not self.reached(moment, after):
            time.sleep(0.0005)
        time.sleep(delay)
        self.job.kill()
        return self.end() != 0

    def end(self) -> int:
        """Its exit code; a failure that is no kill is raised."""
        code = self.job.wait()
        self.reader.join()
        error = self.job.stderr.read()
        self.job.stdout.close()
        self.job.stderr.close()
        if code not in (0, -9):
            raise RuntimeError(f"exit code {code}: {error[-2000:]}")
        return code


def moment_of(rng: random.Random, number: int) -> tuple[str, int, float]:
    """What to wait for: the phase, in turn; steps into this life; seconds more."""
    moment = MOMENTS[-1 - number % len(MOMENTS)]
    longest = {"start": 6.0, "compile": 4.0, "step": 0.2, "save": 0.05, "delete": 0.002}
    return moment, rng.randint(1, STEPS_A_LIFE), rng.uniform(0, longest.get(moment, 0.02))


def losses(out: Path) -> dict[int, str]:
    """Each step's loss, as written; a step that comes twice or is missing is a failure."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: float(line["loss"]).hex() for line in lines}
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        raise RuntimeError("metrics.jsonl has not one line a step")
    return found


def numbers(out: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint."""
    import tensorstore

    found = {}
    for part in ("params", "opt"):
        base = f"file://{out}/checkpoints/{step}/{part}/"
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        for key in store.list().result():
            found[f"{part}/{key.decode()}"] = store.read(key).result().value
    return found


def chain(text: Path, out: Path, steps: int, kills: int, seed: int) -> dict:
    """Kill and start again; counts by moment."""
    rng, words = random.Random(seed), command(text, out, steps)
    at: collections.Counter[str] = collections.Counter()
    saves = deletions = lost = redone = killed = 0
    best = 0
    while killed < kills:
        moment, after, delay = moment_of(rng, killed)
        life = Life(words, out)
        if not life.kill_at(moment, after, delay):
            raise RuntimeError(f"done after {killed} kills; more steps are needed")
        killed += 1
        at[moment] += 1
        saves += any("tmp" in name for name in names(out))
        deletions += any(name.endswith(".deleted") for name in names(out))
        newest = max(complete(out), default=0)
        lost += newest < max(best, life.seen)
        best = max(best, newest)
        written = out / "metrics.jsonl"
        redone += max(0, (written.read_text().count("\n") if written.exists() else 0) - newest)
        print(
            f"kill {killed}: {moment}, {life.steps} steps, newest checkpoint {newest}", flush=True
        )
    Life(words, out).end()
    return {
        "kills": killed,
        "at": dict(at),
        "checkpoints_lost": lost,
        "left_a_save_unfinished": saves,
        "left_a_deletion_unfinished": deletions,
        "steps_done_again": redone,
        "leftovers": sorted(name for name in names(out) if not name.isdecimal()),
    }


def compare(kills: int, seed: int, folder: Path, steps: int) -> dict:
    """A run that nobody kills, and one that is killed `kills` times."""
    os.environ["K2JAX_CACHE"] = str(folder / "cache")  # compiled once, and nothing of the user's
    text = texts(folder / "text")
    Life(command(text, folder / "whole", steps), folder / "whole").end()
    found = chain(text, folder / "killed", steps, kills, seed)
    wanted, got = losses(folder / "whole"), losses(folder / "killed")
    same = sum(got.get(step) == loss for step, loss in wanted.items())
    last, right = (numbers(folder / name, steps) for name in ("killed", "whole"))
    return {
        "bench": "faults",
        "seed": seed,
        "steps": steps,
        **found,
        "losses_bit_identical": f"{same} of {len(wanted)}",
        "last_checkpoint_identical": last == right,
    }


def main(kills: int, seed: int) -> None:
    """Print the table and the line."""
    with tempfile.TemporaryDirectory() as folder:
        found = compare(kills, seed, Path(folder), steps=kills * STEPS_A_LIFE + 10)
    print("| killed while | kills |\n|---|---|")
    for moment, count in found["at"].items():
        print(f"| {moment} | {count} |")
    print(json.dumps(found))


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*(given + [30, 0][len(given) :]))
