"""A run that is asked to stop saves and ends, wherever the signal comes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import SIZES
from small_runs import changed

from k2jax.checkpoint import Checkpoints
from k2jax.config import RunConfig
from k2jax.evals import perplexity
from k2jax.training import compile as compiling
from k2jax.training import loop
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics


def test_a_signal_saves_and_says_how_to_go_on(stopped):
    out, lines = stopped
    assert Checkpoints(out).steps() == [3]
    assert lines[-1] == "stopped and saved at step 3; rerun the same command to resume"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_notice_after_the_last_step_ends_the_look_back(run, again, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "k2jax.training.loop.compressors", lambda texts: os.kill(os.getpid(), signal.SIGTERM) or {}
    )
    train(run, again, say=lines.append)
    assert lines[-1] == "stopped; step 6 is saved, and the same command scores and plots the run"
    monkeypatch.undo()
    train(run, again, say=lines.append, init="elsewhere")
    assert f"--init elsewhere is not used: {again} has a checkpoint" in lines
    assert (again / "loss.png").exists()


def twice() -> None:
    """A notice, and its repetition."""
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)


def noticed(monkeypatch, place: object, name: str) -> None:
    """Calling this for the first time brings a notice."""
    call, calls = getattr(place, name), []

    def wrapped(*args, **kwargs):
        if not calls:
            twice()
        calls.append(1)
        return call(*args, **kwargs)

    monkeypatch.setattr(place, name, wrapped)


NOTICES = {  # where, and how far a run that goes on from step 3 still gets
    "compiling": (compiling, "compile_step", 4),
    "restoring": (Checkpoints, "restore", 4),
    "a step": (loop, "to_devices", 4),
    "evaluation": (perplexity, "eval_batches", 6),
    "a save": (Checkpoints, "save", 7),  # of step 6; asked after the next step
}


@pytest.mark.parametrize("name", NOTICES)
def test_a_notice_ends_the_run_saved_wherever_it_comes(name, run, whole, again, monkeypatch):
    place, function, step = NOTICES[name]
    noticed(monkeypatch, place, function)
    lines: list[str] = []
    train(changed(run, "train", steps=8, eval_every=6, save_every=6), again, say=lines.append)
    assert lines[-1] == f"stopped and saved at step {step}; rerun the same command to resume"
    assert Checkpoints(again).latest() == step
    assert [line["step"] for line in read_metrics(again)] == list(range(1, step + 1))


def command(run: RunConfig, out: Path) -> list[str]:
    """`k2jax train` of this run for more steps than anyone waits for."""
    settings = {f"model.{name}": size for name, size in SIZES.items()}
    settings |= {
        "data.path": run.data.path,
        "data.rows": 8,
        "data.context": 32,
        "optim.name": "adamw",
        "train.steps": 1_000_000,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.save_every": 500_000,
        "mesh.data": 1,
        "mesh.expert": 1,
        "mesh.model": 1,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "k2jax.cli", "train", "tiny", "--out", str(out), *words]


def terminated(words: list[str]) -> list[str]:
    """The lines of a command that gets SIGTERM after its second step."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        lines, steps = [], 0
        for line in job.stdout:
            lines.append(line.rstrip("\n"))
            steps += line.startswith("step ")
            if steps == 2 and line.startswith("step "):  # once: a second signal would kill
                job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 0, job.stderr.read()
        assert "Traceback" not in job.stderr.read()
    return lines


def test_the_command_saves_on_sigterm_exits_0_and_goes_on_when_given_again(run, tmp_path):
    words = command(run, tmp_path / "out")
    first = terminated(words)
    step = Checkpoints(tmp_path / "out").latest()
    assert first[-1] == f"stopped and saved at step {step}; rerun the same command to resume"
    second = terminated(words)
    assert f"resuming from step {step} in {tmp_path / 'out'}" in second
    assert Checkpoints(tmp_path / "out").latest() > step
    steps = [line["step"] for line in read_metrics(tmp_path / "out")]
    assert steps == list(range(1, Checkpoints(tmp_path / "out").latest() + 1))
