"""Commands in several processes, over loopback or on hosts of their own."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from hosts import Hosts
from small_model import SIZES

from k2jax.checkpoint import Checkpoints
from k2jax.config import ModelConfig, RunConfig, to_json
from k2jax.params.arrays import initial
from k2jax.params.kimi import declare_kimi
from k2jax.text.kimi_tokenizer import FILE
from k2jax.text.train_bpe import train_tokenizer
from k2jax.training.metrics import read_metrics

# XLA's CPU products split their sums by the threads of a process: as many in every process, what
# one process of 8 devices has anyway.
THREADS = "8"
# Two devices are enough for the test that always runs: its time is compile time.
MESH2 = {"mesh.data": 2, "mesh.expert": 1, "mesh.model": 1}
CFG = ModelConfig(**SIZES | {"dense_layers": 0, "context": 64}, init_std=0.3)


def write_text(folder: Path) -> None:
    """Files to train on, for `Job`."""
    (folder / "text").mkdir()
    for number in range(30):
        words = (f"def f{number}_{i}(x): return x + {i * number}\n" for i in range(20))
        (folder / "text" / f"{number}.py").write_text("".join(words))


def write_run(folder: Path) -> None:
    """A run's folder with random weights of `CFG`, to score and to serve."""
    with Checkpoints(folder) as checkpoints:
        params = initial(declare_kimi(CFG), 0, CFG.init_std)
        checkpoints.save(1, {"params": params}, {"config": to_json(RunConfig(model=CFG))})
    train_tokenizer(["def f(x): return x + 1\n" * 50], 512, folder / FILE)


def make_environment(place: Path) -> dict[str, str]:
    """Of a process that shares its caches with all others of a test."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    return os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "K2JAX_CACHE": str(place),
        "JAX_COMPILATION_CACHE_DIR": str(place / "programs"),
        "PJRT_NPROC": THREADS,
    }


def start(
    command: list[str], environment: dict[str, str], hosts: Hosts | None = None, number: int = 0
) -> subprocess.Popen:
    """Start a process here, or on one of the hosts."""
    if hosts is not None:
        return hosts.start(number, command, environment)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def end(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str, list[str]]]:
    """Exit code, stdout, and our own lines of stderr, of each process."""
    ended = []
    try:
        for process in processes:
            printed, errors = process.communicate(timeout=seconds)
            ours = [line for line in errors.splitlines() if line.startswith("k2jax: ")]
            assert "Traceback" not in errors, errors
            assert process.returncode != -signal.SIGABRT, errors[-3000:]  # XLA's and gloo's way out
            ended.append((process.returncode, printed, ours))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended


class Job:
    """`k2jax train` in some processes of this machine, or one on each of some hosts."""

    def __init__(
        self,
        place: Path,
        out: Path,
        count: int,
        steps: int,
        port: int = 0,
        hosts: Hosts | None = None,
        *,
        start_by: tuple[str, ...] = ("-m", "k2jax.cli"),
        first_says: str = "",
        **settings,
    ):
        """`first_says`: what process 0 must have said on stderr before the others are started."""
        if hosts is None:
            with socket.create_server(("127.0.0.1", port)) as free:
                self.address = f"127.0.0.1:{free.getsockname()[1]}"
        else:
            self.address = f"{hosts.addresses[0]}:29400"
        fields = {f"model.{name}": size for name, size in SIZES.items()} | MESH2
        fields |= {
            "data.path": place / "text",
            "data.rows": 8,
            "data.context": 32,
            "optim.name": "adamw",
            "optim.learning_rate": 1e-2,
            "optim.warmup": 2,
            "optim.decay": 0,
            "train.steps": steps,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.save_every": 3,
            "train.keep": 9,
        }
        fields |= {name.replace("__", "."): value for name, value in settings.items()}
        words = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
        train = [sys.executable, *start_by, "train", "tiny", "--out", str(out), *words]
        self.processes = []
        for number in range(count):
            by_hand = ["--coordinator", self.address, "--processes", count, "--process", number]
            command = [*train, *(map(str, by_hand) if count > 1 else ())]
            self.processes.append(start(command, make_environment(place), hosts, number))
            if number == 0 and first_says:
                lines = self.processes[0].stderr
                assert any(line.startswith(first_says) for line in lines), first_says

    def until(self, step: int) -> None:
        """Read what process 0 says up to its line of a step."""
        for line in self.processes[0].stdout:
            if line.startswith(f"step {step}/"):
                return
        raise AssertionError(self.processes[0].stderr.read())

    def end(self, seconds: float = 300) -> list[tuple[int, str, list[str]]]:
        """Exit code, stdout, and our own lines of stderr, of each process."""
        return end(self.processes, seconds)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]
